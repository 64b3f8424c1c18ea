"""Text up to the first of some strings, as it arrives piece by piece."""

from collections.abc import Sequence


class StopText:
    """Passes text on until one of the strings is complete, and ends before that.

    What may be the start of one is held back, so nothing depends on how the text is cut into
    pieces: it ends before the string that is complete first, of those that end there the longest.

    Args:
      stops: the strings, none of them empty; no strings: all text passes.

    Attributes:
      is_complete: whether one has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_complete = False

    def push(self, piece: str) -> str:
        """Returns the text that is now known to stand before any of the strings."""
        text = self._held + piece
        found = [stop for stop in self._stops if stop in text]
        if found:
            self._held, self.is_complete = "", True
            return text[: min((text.find(stop) + len(stop), text.find(stop)) for stop in found)[1]]
        kept = len(text) - self._num_open(text)
        self._held = text[kept:]
        return text[:kept]

    def rest(self) -> str:
        """Returns what was held back, when no more text follows."""
        return self._held

    def _num_open(self, text: str) -> int:
        """How many characters at the end of a text are the longest start of a string."""
        lengths = (
            length
            for stop in self._stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        )
        return max(lengths, default=0)
