"""Which implementation of an operation runs, and the reasons against the others."""

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from pallas_kernels import targets
from pallas_kernels.targets import Target


class CannotRun(NotImplementedError):
    """None of the implementations asked for can compute a call; the message says why."""


@runtime_checkable
class Implementation(Protocol):
    """What every module of `Implementations` defines, next to what computes the call."""

    def refusal(self, call: Any, target: Target) -> str | None:
        """Returns why it cannot compute the call there; None when it can."""


@runtime_checkable
class Reserved(Implementation, Protocol):
    """A module that may have reasons to be taken by name only."""

    def reservation(self, call: Any) -> str | None:
        """Returns why it is not taken where the best one is asked for; None if it is."""


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
        machine = self.target.name or self.target.platform
        ending = f"none can run on {machine}"
        if self.taken is not None:
            ending = f"{self.taken}: taken on {machine}"
        return "\n".join([*lines, ending])

    def required(self) -> str:
        """Returns the name that is taken.

        Raises:
            CannotRun: there is none; says why in one line.
        """
        if self.taken is None:
            raise CannotRun("; ".join(str(self).splitlines()))
        return self.taken


@dataclasses.dataclass(frozen=True)
class Implementations:
    """The implementations of one operation.

    Attributes:
        package: holds one module of each name, imported when it is considered: only
            there stand the imports of optional packages.
        names: best first.
    """

    package: str
    names: tuple[str, ...]

    def choose(self, call: Any, implementation: str | Sequence[str] | None) -> Choice:
        """Returns the first implementation that can compute the call.

        Raises:
            ValueError: a name is unknown.
        """
        target = targets.current()
        refusals: dict[str, str] = {}
        for name in self.asked_for(implementation):
            module = self.load(name)
            reason = module.refusal(call, target)
            if reason is None and implementation is None and isinstance(module, Reserved):
                reason = module.reservation(call)
            if reason is None:
                return Choice(name, refusals, target)
            refusals[name] = reason
        return Choice(None, refusals, target)

    def load(self, name: str) -> Any:
        """Imports the module of an implementation."""
        return _load(f"{self.package}.{name}")

    def asked_for(self, implementation: str | Sequence[str] | None) -> Sequence[str]:
        """Returns the names in the order to try.

        Raises:
            ValueError: a name is unknown.
        """
        if implementation is None:
            return self.names
        names = [implementation] if isinstance(implementation, str) else implementation
        is_list = isinstance(names, Sequence) and len(names) > 0
        if not is_list or any(name not in self.names for name in names):
            raise ValueError(
                f"implementation={implementation!r} must name one or more of "
                f"{self.names}, or be None for the best available"
            )
        return names


@functools.cache
def _load(module: str) -> Implementation:
    return importlib.import_module(module)
