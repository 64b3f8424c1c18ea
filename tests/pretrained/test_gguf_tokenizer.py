"""Tokenizers in GGUF metadata, rebuilt: what cuts text, what merges, and what comes back."""

import numpy as np
import pytest
import tokenizers

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.gguf_tokenizer import rebuild

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def byte_level(pre, merges=(), **changes):
    """Metadata of a vocabulary of bytes, these merges, a control and a user's token."""
    tokens = [*BYTES, *("".join(merge.split(" ")) for merge in merges), "<|end|>", "<think>"]
    types = [1] * (len(tokens) - 2) + [3, 4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    } | changes


def made(metadata, architecture="llama"):
    found = rebuild(Fields(metadata, "a.gguf"), architecture)
    return tokenizers.Tokenizer.from_str(found.json.decode()), found


def pieces(metadata, text, architecture="llama"):
    tokenizer, _ = made(metadata, architecture)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    return encoding.tokens


# Merges that would join whatever the pattern leaves together.
GREEDY = ("1 2", "12 3", "123 4", "Ġ 1", "Ġ Ġ", "' S", "x !", "! Ċ", "Ċ Ċ", "a b", "b c")


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["1234"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("gpt-2", "  1", ["Ġ", "Ġ1"]),
        ("smollm", "  1", ["ĠĠ", "1"]),  # digits are cut before spaces are met
        ("llama-bpe", "  1", ["Ġ", "Ġ", "1"]),
        ("llama-bpe", "'S", ["'S"]),
        ("gpt-2", "'S", ["'", "S"]),  # contractions in small letters alone
        ("llama-bpe", "!\n\n", ["!Ċ", "Ċ"]),  # punctuation takes the ends of lines
        ("gpt-2", "!\n\n", ["!", "ĊĊ"]),
        ("gpt-2", "a<|end|><think>b", ["a", "<|end|>", "<think>", "b"]),
        ("gpt-2", "żółć 🙂", None),
    ],
)
def test_what_cuts_text(pre, text, expected):
    found = pieces(byte_level(pre, GREEDY), text)
    assert expected is None or found == expected


def test_words_that_are_tokens_are_not_merged():
    """ "abc" is a token that no merges make: "a b" comes first."""
    metadata = byte_level("llama-bpe", GREEDY)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "abc"]
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.append(types, 1)
    assert pieces(metadata, "abc") == ["abc"]
    assert pieces(metadata | {"tokenizer.ggml.pre": "gpt-2"}, "abc") == ["ab", "c"]


def test_composed_before_all_else():
    tokenizer, _ = made(byte_level("qwen2"))
    one, other = (tokenizer.encode(text).ids for text in ("e\u0301", "\u00e9"))
    assert one == other


PIECES = ("▁", "a", "b", "c", "bc", "ab", "▁a", "▁▁")


def sentencepiece(scores, **changes):
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *PIECES],
        "tokenizer.ggml.scores": np.array([0.0] * len(special) + list(scores), np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def test_sentencepiece_merges_by_score():
    """Letters -9; "bc" before "ab" or after it, by their scores."""
    letters, rest = [-9.0] * 4, [-5.0, -6.0]
    for bc, ab, expected in ((-1.0, -2.0, ["▁a", "bc"]), (-2.0, -1.0, ["▁", "ab", "c"])):
        metadata = sentencepiece([*letters, bc, ab, *rest])
        assert pieces(metadata, "abc") == expected


def test_sentencepiece_of_gemma():
    """No space before the text, runs of spaces as such, and the order of tokens is that of merges."""
    metadata = sentencepiece([-9.0] * 8)
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*tokens[:-1], "  "]
    metadata["tokenizer.ggml.token_type"][-1] = 4
    assert pieces(metadata, "abc  a", "gemma3") == ["a", "bc", "▁", "▁a"]
    del metadata["tokenizer.ggml.tokens"][-2:]
    metadata["tokenizer.ggml.tokens"] += ["  ", "▁a"]
    metadata["tokenizer.ggml.token_type"][-2:] = [4, 1]
    assert pieces(metadata, "abc  a", "gemma3") == ["a", "bc", "▁▁", "a"]


def test_bytes_of_what_is_no_piece():
    assert pieces(sentencepiece([-9.0] * 8), "ż") == ["▁", "<0xC5>", "<0xBC>"]


@pytest.mark.parametrize(
    ("metadata", "bos"),
    [
        (sentencepiece([-9.0] * 8), "<s>"),
        (sentencepiece([-9.0] * 8, **{"tokenizer.ggml.add_bos_token": False}), ""),
        (byte_level("gpt-2"), ""),
        (byte_level("gpt-2", **{"tokenizer.ggml.bos_token_id": 256}), ""),
        (
            byte_level(
                "gpt-2",
                **{"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.add_bos_token": True},
            ),
            "<|end|>",
        ),
    ],
)
def test_what_begins_a_text(metadata, bos):
    tokenizer, found = made(metadata)
    assert found.bos_token == bos
    assert found.eos_token in ("</s>", "<|end|>")
    assert found.stop_tokens == ()
    starts = tokenizer.encode("a").tokens[0] == bos
    assert starts == bool(bos)  # also for other programs that read the file


def test_the_end_of_a_turn_ends_a_continuation():
    end = {
        f"tokenizer.ggml.{name}_token_id": number for name, number in (("eot", 257), ("eom", 256))
    }
    _, found = made(byte_level("gpt-2", **end))
    assert (found.eos_token, found.stop_tokens) == ("<|end|>", ("<think>",))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model is missing"),
        (byte_level("gpt-9"), "tokenizer.ggml.pre='gpt-9': known are gpt-2, smollm"),
        (byte_level("gpt-2", **{"tokenizer.ggml.model": "t5"}), "model='t5': known are"),
        (byte_level("gpt-2", **{"tokenizer.ggml.tokens": "abc"}), "must be list"),
        (byte_level("gpt-2", **{"tokenizer.ggml.tokens": ["a"]}), "258 entries for 1 tokens"),
        (byte_level("gpt-2", **{"tokenizer.ggml.merges": ["a zz"]}), "tokenizer.ggml.merges"),
        (byte_level("gpt-2", **{"tokenizer.ggml.merges": ["ab"]}), "tokenizer.ggml.merges"),
        (byte_level("gpt-2", **{"tokenizer.ggml.eos_token_id": 999}), "there are 258 tokens"),
        (byte_level("gpt-2", **{"tokenizer.ggml.eos_token_id": -1}), "there are 258 tokens"),
        (
            byte_level(
                "gpt-2",
                **{
                    "tokenizer.ggml.tokens": ["a", "a"],
                    "tokenizer.ggml.token_type": np.array([1, 1]),
                },
            ),
            "'a' is there twice",
        ),
        (
            sentencepiece([-9.0] * 8, **{"tokenizer.ggml.scores": np.zeros(3)}),
            "scores has 3 entries",
        ),
    ],
)
def test_bad_metadata(metadata, message):
    with pytest.raises(ConfigError) as error:
        made(metadata)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
