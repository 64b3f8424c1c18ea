"""What a user sees of a run: lines that stay, and on a terminal a bar below them."""

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping

from tqdm import tqdm

# The bar is drawn anew this often, so that it moves while a step or a compilation lasts.
SECONDS = 0.5


class Progress:
    """Lines on stdout, and a bar of steps on stderr if that is a terminal.

    Args:
      first_step: the step the run starts from.
      num_steps: the step it ends at.
    """

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._bar = None
        if not sys.stderr.isatty():
            return
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_moving, daemon=True)
        self._thread.start()

    def advance(self, step: int) -> None:
        """Moves the bar to a step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def numbers(self, shown: Mapping[str, str]) -> None:
        """Writes numbers behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix(shown)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Writes what the run does before the bar, as long as it does."""
        if self._bar is None:
            yield
            return
        self._bar.set_description(what)
        try:
            yield
        finally:
            self._bar.set_description()

    def line(self, text: str) -> None:
        """Prints text that stays above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Ends the bar, which stays as it is."""
        if self._bar is not None:
            self._closing.set()
            self._thread.join()
            self._bar.close()

    def _keep_moving(self) -> None:
        while self._bar is not None and not self._closing.wait(SECONDS):
            self._bar.refresh()
