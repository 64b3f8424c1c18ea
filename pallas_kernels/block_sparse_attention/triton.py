"""To come."""

from jaxtyping import Array

from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.targets import Target


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there."""
    return "not there yet"


def attend(call: Call, target: Target) -> tuple[Array, Array]:
    """Returns (out, lse)."""
    raise NotImplementedError
