"""Notices that the process was asked to terminate (SIGTERM), on one host or several."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context manager under which SIGTERM only sets a mark, for the loop to act on."""

    def __init__(self) -> None:
        self._marked = False

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:  # else jax's own notifier has the signal
            self._previous = signal.signal(signal.SIGTERM, self._mark)
        return self

    def __exit__(self, *exception: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self, step: int) -> bool:
        """Returns whether to stop at this step; all processes agree on the step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._marked

    def _mark(self, number: int, frame: FrameType | None) -> None:
        self._marked = True
