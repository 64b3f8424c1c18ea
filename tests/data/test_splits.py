import pytest

from sparseformer_jax.data.pieces import Piece
from sparseformer_jax.data.splits import bytes_if_too_few, cut_by_position, draw

HELD_OUT = {"test": 0.1, "validation": 0.2}
BOOK = b"".join(b"line %d\n" % i for i in range(100))


def documents(*texts):
    return [Piece(text, True) for text in texts]


def cut(pieces, held_out=HELD_OUT):
    size = sum(len(piece.text) for piece in pieces)
    found = {}
    for split, piece in cut_by_position(pieces, held_out, size):
        found.setdefault(split, []).append(piece)
    return found


def test_all_pieces_of_a_document_are_in_the_split_of_the_first():
    first = [Piece(b"%d" % i, True) for i in range(50)]
    pieces = [piece for begin in first for piece in (begin, Piece(b"more", False))]
    drawn = [split for split, _ in draw(first, HELD_OUT)]
    assert set(drawn) == {"train", "validation", "test"}
    assert [split for split, _ in draw(pieces, HELD_OUT)] == [s for s in drawn for _ in range(2)]


def test_one_document_is_cut_where_lines_end():
    found = cut([Piece(BOOK[:300], True), Piece(BOOK[300:], False)])
    texts = {split: b"".join(p.text for p in pieces) for split, pieces in found.items()}
    assert list(texts) == ["train", "validation", "test"]
    assert b"".join(texts.values()) == BOOK
    assert all(text.endswith(b"\n") for text in texts.values())
    shares = [len(text) / len(BOOK) for text in texts.values()]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.02)
    for pieces in found.values():
        assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def test_short_documents_stay_whole():
    texts = [b"%d" % i for i in range(10)]
    found = cut(documents(*texts))
    assert [p.text for pieces in found.values() for p in pieces] == texts
    assert {split: len(pieces) for split, pieces in found.items()} == {
        "train": 7,
        "validation": 2,
        "test": 1,
    }
    assert all(piece.begins for pieces in found.values() for piece in pieces)


@pytest.mark.parametrize("text", [b"word " * 100, b"x" * 99, "é".encode() * 60])
def test_without_lines_every_split_still_has_text(text):
    found = cut(documents(text))
    assert b"".join(p.text for pieces in found.values() for p in pieces) == text
    assert len(found) == 3
    for (piece,) in found.values():
        piece.text.decode()
        assert not text.startswith(b"word") or piece.text.split() == [b"word"] * len(
            piece.text.split()
        )


def test_a_split_without_a_share_gets_nothing():
    assert set(cut(documents(BOOK), {"test": 0.0, "validation": 0.1})) == {"train", "validation"}
    assert set(cut(documents(BOOK), {"test": 0.1, "validation": 0.0})) == {"train", "test"}


def test_too_few_documents():
    assert bytes_if_too_few(documents(BOOK), HELD_OUT) == len(BOOK)
    assert bytes_if_too_few(documents(BOOK), {"test": 0.0, "validation": 0.0}) is None
    many = documents(*(b"%d" % i for i in range(99)))
    assert bytes_if_too_few(many, HELD_OUT) is None
    rest = iter(many)
    bytes_if_too_few(rest, HELD_OUT)
    assert len(list(rest)) > 70  # it read no further than it had to
