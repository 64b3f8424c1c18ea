"""Ends a run that is asked to: by SIGTERM, on one host or several, or by Ctrl-C."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop(BaseException):
    """The run ends early, as it was asked to. No Exception: nobody may take it for an error."""


class Preemption:
    """A context manager under which SIGTERM and Ctrl-C ask the loop to save and stop.

    A second Ctrl-C ends the process at once, even while a compilation keeps Python waiting.
    With several processes jax' own notifier has SIGTERM, and all stop at the same step;
    Ctrl-C is passed on to it.

    Attributes:
      number: of the signal that came to this process; None: none yet.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._is_interruptible = False
        self._is_alone = jax.process_count() == 1

    def __enter__(self) -> "Preemption":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)  # as the wake-up descriptor has to be
        self._previous_descriptor = signal.set_wakeup_fd(self._sender.fileno())
        threading.Thread(target=self._watch, daemon=True).start()
        numbers = _SIGNALS if self._is_alone else (signal.SIGINT,)
        self._previous = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        self._sender.close()

    def requested(self, step: int) -> bool:
        """Returns whether to stop at this step; all processes agree on the step."""
        if self._is_alone:
            return self.number is not None
        return multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises Stop inside, at once, when asked to stop: nothing there is worth saving.

        With several processes the next step stops instead, as they have to agree on it.
        """
        self._is_interruptible = self._is_alone
        try:
            self._raise_if_asked()
            yield
        finally:
            self._is_interruptible = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)
        self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self._is_interruptible and self.number is not None:
            self._is_interruptible = False
            raise Stop

    def _watch(self) -> None:
        """Reads the numbers of the signals, as Python's C code notes them at once."""
        asked = False
        with self._receiver:
            while received := self._receiver.recv(1):
                if received[0] == signal.SIGINT and asked:
                    os._exit(128 + signal.SIGINT)
                asked = asked or received[0] in _SIGNALS
