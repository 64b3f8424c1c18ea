import errno
import json
import os

import numpy as np
import pytest

from sparseformer_jax.data import ByteTokenizer, load_corpus, pieces
from sparseformer_jax.data import corpus as corpus_module


class Words:
    """One id for each word, its length."""

    bos_id = None
    eos_id = 1
    stop_ids = frozenset({1})
    fingerprint = "words"

    def __init__(self, vocab_size=10):
        self.vocab_size = vocab_size

    def encode(self, text):
        return np.array([len(word) for word in text.split()], np.int32)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        raise NotImplementedError


@pytest.fixture
def texts(data, tmp_path):
    """A config with two training documents and an empty one."""
    (tmp_path / "text").mkdir()
    for i, text in enumerate(["one threé", "", "fiver"]):
        (tmp_path / "text" / f"train{i}.txt").write_text(text)
    data.files = (str(tmp_path / "text"),)
    return data


def test_tokens_of_documents(texts):
    corpus = load_corpus(texts, "train", Words())
    documents = {tuple(document(corpus, i)) for i in range(corpus.num_documents)}
    assert documents == {(3, 5, 1), (1,), (5, 1)}
    assert sorted(corpus.byte_lengths) == [0, 5, 10]
    assert (corpus.num_documents, corpus.num_bytes, corpus.num_tokens) == (3, 15, 6)
    assert corpus.num_predicted_tokens == 3


def test_boundary_tokens(texts):
    tokens = [
        len(load_corpus(texts, "train", ByteTokenizer(bos, eos)).tokens)
        for bos in ("", "<bos>")
        for eos in ("", "<eos>")
    ]
    assert tokens == [15, 18, 18, 21]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65537, np.uint32)]
)
def test_smallest_dtype(texts, vocab_size, dtype):
    tokens = load_corpus(texts, "train", Words(vocab_size)).tokens
    assert tokens.dtype == dtype
    assert isinstance(tokens, np.memmap)


def test_computed_once(texts, monkeypatch):
    first = load_corpus(texts, "train", Words())
    monkeypatch.setattr(corpus_module, "_write", lambda *_: pytest.fail("again"))
    second = load_corpus(texts, "train", Words())
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.fingerprint == second.fingerprint


def test_another_tokenizer_or_text_is_another_corpus(texts, tmp_path):
    tokenizers = (Words(), ByteTokenizer(), ByteTokenizer(""), ByteTokenizer("", ""))
    found = [load_corpus(texts, "train", each).fingerprint for each in tokenizers]
    (tmp_path / "text" / "train0.txt").write_text("changed")
    found.append(load_corpus(texts, "train", Words()).fingerprint)
    assert len(set(found)) == 5


def test_an_interrupted_tokenisation_leaves_nothing(texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_corpus(texts, "train", Words())
    assert not list((tmp_path / "cache" / "tokens").iterdir())
    assert load_corpus(texts, "train", Words()).num_tokens == 6


def test_a_full_disk_while_tokenising(texts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(ValueError, match="^data.cache_dir: cannot write .*No space left"):
            load_corpus(texts, "train", Words())
    assert not list((tmp_path / "cache" / "tokens").iterdir())
    assert load_corpus(texts, "train", Words()).num_tokens == 6


def test_pieces_of_a_document_are_one_document(data, tmp_path, monkeypatch):
    """Encoded in batches of any size, which stands for any number of cores."""
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} " + "word " * 40}) for i in range(9))
    )
    data.files = (str(tmp_path / "train.jsonl"),)
    data.cache_dir = str(tmp_path / "whole")
    whole = load_corpus(data, "train", ByteTokenizer())
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    for size in (1, 100, 10_000):
        monkeypatch.setattr(corpus_module, "_BATCH_BYTES", size)
        data.cache_dir = str(tmp_path / str(size))
        corpus = load_corpus(data, "train", ByteTokenizer())
        assert sorted(document(corpus, i) for i in range(9)) == sorted(
            document(whole, i) for i in range(9)
        )
        np.testing.assert_array_equal(corpus.byte_lengths, whole.byte_lengths)


def document(corpus, i):
    return corpus.tokens[corpus.offsets[i] :][: corpus.lengths[i]].tolist()


def test_mistakes(texts, tmp_path):
    with pytest.raises(ValueError, match="to 5, outside its vocab_size of 5"):
        load_corpus(texts, "train", Words(5))
    with pytest.raises(ValueError, match="no document is in split 'test', only in train"):
        load_corpus(texts, "test", Words())
    load_corpus(texts, "train", Words())
    (tokens,) = (tmp_path / "cache").rglob("tokens.bin")
    tokens.write_bytes(b"")
    with pytest.raises(ValueError, match="^data.cache_dir: .* is damaged; delete it"):
        load_corpus(texts, "train", Words())


def test_nothing_but_empty_documents(data, tmp_path):
    (tmp_path / "train.txt").write_text("")
    data.files = (str(tmp_path / "train.txt"),)
    with pytest.raises(ValueError, match="documents of split 'train' are all empty"):
        load_corpus(data, "train", ByteTokenizer("", ""))
