import io

import pytest

from sparseformer_jax.data import pieces
from sparseformer_jax.data.pieces import Piece, cut, last_border


@pytest.fixture
def short(monkeypatch):
    """Pieces of 16 bytes."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16)


@pytest.mark.parametrize(
    ("text", "limit", "end"),
    [
        (b"one\ntwo\nthree four", 12, 8),  # the last line that ends there
        (b"one\ntwo\n\n  three", 12, 7),  # not between a line's end and more space
        (b"one\ntwo three four", 12, 7),  # that line ends before the half: a word
        (b"one\ntwothreefourfive", 12, 12),  # neither: a character
        ("aaaaaaé".encode(), 7, 6),
        ("aaa🙂".encode(), 6, 3),
        ("é".encode(), 1, 0),
        (b"whole", 5, 5),
        (b"", 0, 0),
        (b"\x80" * 9, 6, 6),  # no text at all: decoding will tell
    ],
)
def test_last_border(text, limit, end):
    assert last_border(text, limit) == end


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 100, "é" * 50, "a line\n" * 9, "five words in a\n line" * 7]
)
def test_pieces_join_to_the_document(short, text):
    found = list(cut(io.BytesIO(text.encode())))
    assert "".join(piece.text.decode() for piece in found) == text
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert max(len(piece.text) for piece in found) <= 16
    assert all(len(piece.text) >= 7 for piece in found[:-1])


def test_where_it_is_cut_depends_on_the_text_alone(short):
    class Trickle(io.BytesIO):
        def read(self, size):
            return super().read(min(size, 3))

    text = b"some words\nand lines\n" * 5
    assert list(cut(Trickle(text))) == list(cut(io.BytesIO(text)))


def test_cuts_where_lines_end(short):
    found = cut(io.BytesIO(b"first line\nsecond line\nthird"))
    assert list(found) == [
        Piece(b"first line\n", True),
        Piece(b"second line\n", False),
        Piece(b"third", False),
    ]
