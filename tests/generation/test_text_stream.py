"""Text appears as soon as its characters are whole, and adds up to the text of all tokens."""

import pytest

from sparseformer_jax.data import ByteTokenizer
from sparseformer_jax.generation.text_stream import TextStream


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b"ab", ["a", "b"]),
        ("żó".encode(), ["", "ż", "", "ó"]),
        ("€".encode(), ["", "", "€"]),
        (b"\xffa", ["", "\ufffda"]),
        (b"\xe2\x82a", ["", "", "\ufffda"]),
    ],
)
def test_a_character_comes_with_its_last_byte(text, pieces):
    stream = TextStream(ByteTokenizer().decode, list("naïve".encode()))
    assert [stream.push(token) for token in text] == pieces
    assert stream.rest() == ""


def test_what_stays_unfinished_comes_last():
    stream = TextStream(ByteTokenizer().decode)
    assert [stream.push(token) for token in b"a\xe2\x82"] == ["a", "", ""]
    assert stream.rest() == "\ufffd"


def test_text_that_depends_on_the_token_before_is_whole():
    """As in SentencePiece, where the first token of a text loses its space."""
    words = [" the", " cat", "s", " sat", " down"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).removeprefix(" "), [0])
    assert "".join(stream.push(token) for token in (1, 2, 3, 4)) == " cats sat down"


def test_only_the_last_tokens_are_decoded_again():
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return ByteTokenizer().decode(ids)

    stream = TextStream(decode, list(b"a long prompt"))
    for token in b"and a long text":
        stream.push(token)
    assert max(lengths[4:]) == 2
