"""Which implementation runs: names, order of preference and the reasons against each."""

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Array

from pallas_kernels import targets
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.targets import Target

# Best first. Each is a module of this folder, imported when it is considered: only there
# stand the imports of optional packages.
IMPLEMENTATIONS = ("pallas_tpu", "cudnn", "mosaic_gpu", "triton", "xla", "reference")


@runtime_checkable
class Implementation(Protocol):
    """What a module of `IMPLEMENTATIONS` defines."""

    def refusal(self, call: Call, target: Target) -> str | None:
        """Returns why it cannot compute the call there; None when it can."""

    def attend(self, call: Call, target: Target) -> tuple[Array, Array]:
        """Returns (out, lse)."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation is taken for a call, and why not those before it.

    Attributes:
        taken: its name; None when none can run.
        refusals: reasons of those tried before it, by name.
        target: the machine.
    """

    taken: str | None
    refusals: dict[str, str]
    target: Target

    def __str__(self) -> str:
        lines = [f"{name}: {reason}" for name, reason in self.refusals.items()]
        machine = f"{self.target.platform} {self.target.name}".strip()
        ending = f"none can run on {machine}"
        if self.taken is not None:
            ending = f"{self.taken}: taken on {machine}"
        return "\n".join([*lines, ending])


def choose(call: Call, implementation: str | Sequence[str] | None) -> Choice:
    """Returns the first implementation that can compute the call.

    Raises:
        ValueError: a name is unknown.
    """
    target = targets.current()
    refusals: dict[str, str] = {}
    for name in _names(implementation):
        reason = load(name).refusal(call, target)
        if reason is None:
            return Choice(name, refusals, target)
        refusals[name] = reason
    return Choice(None, refusals, target)


@functools.cache
def load(name: str) -> Implementation:
    """Imports the module of an implementation."""
    return importlib.import_module(f"pallas_kernels.block_sparse_attention.{name}")


def _names(implementation: str | Sequence[str] | None) -> Sequence[str]:
    if implementation is None:
        return IMPLEMENTATIONS
    names = [implementation] if isinstance(implementation, str) else implementation
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"implementation={implementation!r} must name one or more of "
            f"{IMPLEMENTATIONS}, or be None for the best available"
        )
    return names
