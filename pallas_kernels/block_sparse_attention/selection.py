"""The implementations of `block_sparse_attention`, in order of preference."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array

from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.selection import Implementations
from pallas_kernels.targets import Target

IMPLEMENTATIONS = Implementations(
    "pallas_kernels.block_sparse_attention",
    ("pallas_tpu", "cudnn", "mosaic_gpu", "triton", "xla", "reference"),
)


@runtime_checkable
class Implementation(Protocol):
    """What a module of `IMPLEMENTATIONS` defines."""

    def refusal(self, call: Call, target: Target) -> str | None:
        """Returns why it cannot compute the call there; None when it can."""

    def attend(self, call: Call, target: Target) -> tuple[Array, Array]:
        """Returns (out, lse)."""


def load(name: str) -> Implementation:
    """Imports the module of an implementation."""
    return IMPLEMENTATIONS.load(name)
