"""Files that are parts of one, memory-mapped and read as one."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sparseformer_jax.checks import ConfigError


class Parts:
    """The bytes of one file, or of the parts it was cut into, in order.

    Args:
      paths: at least one.

    Attributes:
      name: of the first part, for messages.
      size: bytes in all.

    Raises:
      ConfigError: a part is empty or cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = str(paths[0])
        self._maps = [_mapped(path) for path in paths]
        self._ends = list(itertools.accumulate(len(part) for part in self._maps))
        self.size = self._ends[-1]

    def read(self, start: int, length: int) -> UInt8[np.ndarray, " length"]:
        """Returns bytes, without a copy where they lie in one part.

        Raises:
          ValueError: they are not all there.
        """
        if start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"bytes {start} to {start + length} of {self.size}")
        pieces: list[np.ndarray] = []
        while length > 0 or not pieces:
            part = min(bisect.bisect_right(self._ends, start), len(self._maps) - 1)
            begin = start - (self._ends[part] - len(self._maps[part]))
            piece = self._maps[part][begin : begin + length]
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _mapped(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size == 0:
            raise ConfigError(f"{path}: is empty")
        # Slices of a plain view are made faster than those of a memmap.
        return np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
