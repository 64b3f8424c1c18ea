"""Which split a document is in, where the names of files do not tell."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from sparseformer_jax.data.pieces import Piece, last_border


def draw(pieces: Iterable[Piece], held_out: Mapping[str, float]) -> Iterator[tuple[str, Piece]]:
    """Yields each piece with the split of its document, drawn from the first piece's content.

    Args:
      pieces: Of documents, one after the other.
      held_out: Share of the documents in each split but train.
    """
    split = ""
    for piece in pieces:
        if piece.begins:
            split = _drawn(piece.text, held_out)
        yield split, piece


def bytes_if_too_few(pieces: Iterable[Piece], held_out: Mapping[str, float]) -> int | None:
    """Returns the size of all text where `draw` leaves a split without any, else None.

    Reads no further than until each split has a document.
    """
    empty = {"train", *(split for split, share in held_out.items() if share)}
    size = 0
    for split, piece in draw(pieces, held_out):
        empty.discard(split)
        if not empty:
            return None
        size += len(piece.text)
    return size


def cut_by_position(
    pieces: Iterable[Piece], held_out: Mapping[str, float], size: int
) -> Iterator[tuple[str, Piece]]:
    """Yields each piece with its split: first train, then validation, then test.

    A document that lies across the end of a split is cut at a line's end before it, or
    else a word's, and goes on as another document in the next split.

    Args:
      pieces: Of documents, one after the other.
      held_out: Share of the bytes in each split but train.
      size: Bytes of all text.
    """
    ends = _ends(held_out, size)
    split, end = next(ends)
    position, is_cut = 0, False
    for text, begins in pieces:
        while position + len(text) > end:
            at = last_border(text, end - position)
            if at:
                yield split, Piece(text[:at], begins or is_cut)
            text, position, is_cut = text[at:], position + at, True
            split, end = next(ends)
        yield split, Piece(text, begins or is_cut)
        position, is_cut = position + len(text), False


def _ends(held_out: Mapping[str, float], size: int) -> Iterator[tuple[str, int]]:
    """Yields the splits in their order and the byte that each ends before."""
    splits = [split for split in ("validation", "test") if held_out.get(split)]
    after = sum(held_out.values())
    yield "train", int(size * (1 - after))
    for split in splits:
        after -= held_out[split]
        # The last one takes the rest: no rounding leaves bytes over.
        yield split, size if split == splits[-1] else int(size * (1 - after))


def _drawn(text: bytes, held_out: Mapping[str, float]) -> str:
    number = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
    for split, share in held_out.items():
        if number < share:
            return split
        number -= share
    return "train"
