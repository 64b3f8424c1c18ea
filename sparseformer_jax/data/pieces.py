"""Documents in pieces of bounded size, cut where lines or words end."""

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

PIECE_BYTES = 2**20

# The next line begins with no space: tokenizers that join spaces and ends of lines into one
# token find the same tokens on both sides.
_LINE = re.compile(rb".*\n(?=\S)", re.DOTALL)
# Before the space, which most tokenizers take for the begin of a word.
_WORD = re.compile(rb".*\S(?=\s)", re.DOTALL)


class Piece(NamedTuple):
    """A part of a document in UTF-8, no longer than `PIECE_BYTES`, and whether it is the first."""

    text: bytes
    begins: bool


def cut(stream: io.BufferedIOBase) -> Iterator[Piece]:
    """Yields the text of `stream`, one document, in pieces; where it is cut depends on it alone."""
    rest, begins = b"", True
    while block := stream.read(PIECE_BYTES):
        rest += block
        while len(rest) > PIECE_BYTES:
            end = last_border(rest, PIECE_BYTES)
            yield Piece(rest[:end], begins)
            rest, begins = rest[end:], False
    if rest or begins:
        yield Piece(rest, begins)


def last_border(text: bytes, limit: int) -> int:
    """Returns where to cut `text`, at most at `limit` and not before the half of it.

    At the last end of a line there, else of a word, else of a character.
    """
    # One byte more: what follows decides.
    for border in (_LINE, _WORD):
        match = border.match(text[: limit + 1], limit // 2)
        if match:
            return match.end()
    for end in range(limit, max(limit - 4, -1), -1):
        if end == len(text) or text[end] & 0xC0 != 0x80:
            return end
    return limit
