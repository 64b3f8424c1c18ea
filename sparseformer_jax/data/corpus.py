"""The tokens of a split: computed once, kept as memory-mapped arrays."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt
from ml_collections import ConfigDict

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.cache import built_once, cache_root
from sparseformer_jax.data.stored import show_progress
from sparseformer_jax.data.text import make_text
from sparseformer_jax.data.tokenizer import Tokenizer

_FORMAT = 1  # of the files below; a change makes new ones


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of a split as one flat array of tokens.

    A document is its tokenizer's `bos_id`, its text and `eos_id`, where there are such.

    Attributes:
      split: Name of the split.
      tokens: All documents, one after the other, memory-mapped.
      byte_lengths: UTF-8 bytes of each document's text.
      offsets: Where each document begins in `tokens`, and where the last one ends.
      fingerprint: Equal for the same text under the same tokenizer.
    """

    split: str
    tokens: UInt[np.ndarray, " tokens"]
    byte_lengths: Int64[np.ndarray, " documents"]
    offsets: Int64[np.ndarray, " documents+1"]
    fingerprint: str

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.byte_lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, those that begin and end documents included."""
        return len(self.tokens)

    @functools.cached_property
    def num_predicted_tokens(self) -> int:
        """Number of tokens that a model can predict: all but the first of a document.

        Bits per byte = mean loss / ln 2 * num_predicted_tokens / num_bytes.
        """
        return self.num_tokens - int(np.count_nonzero(np.diff(self.offsets)))

    @functools.cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all text."""
        return int(self.byte_lengths.sum())


def load_corpus(data: ConfigDict, split: str, tokenizer: Tokenizer) -> Corpus:
    """Returns the tokens of a split, made and kept in `data.cache_dir` on first use.

    Args:
      data: A config's data section.
      split: "train", "validation" or "test"; of an installed tfds data set, any it has.
      tokenizer: As of `make_tokenizer(data)`.

    Raises:
      ConfigError: the text cannot be read, or has no such split.
    """
    text = make_text(data)
    boundary = (tokenizer.bos_id, tokenizer.eos_id)
    key = json.dumps([_FORMAT, text.fingerprint, tokenizer.fingerprint, boundary])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()

    def write(folder: Path) -> None:
        documents = text.documents(split)
        _write(folder, show_progress(documents, f"tokenising {split}"), tokenizer)

    name = f"{fingerprint[:32]}-{split}"
    folder = built_once(cache_root(data.cache_dir) / "tokens" / name, write)
    return _read(folder, split, _smallest_dtype(tokenizer), fingerprint)


def _write(folder: Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    lengths, byte_lengths = [], []
    dtype = _smallest_dtype(tokenizer)
    with (folder / "tokens.bin").open("wb") as stream:
        for document in documents:
            tokens = _encode(document, tokenizer)
            tokens.astype(dtype).tofile(stream)
            lengths.append(len(tokens))
            byte_lengths.append(len(document.encode()))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "byte_lengths.npy", np.array(byte_lengths, np.int64))


def _encode(document: str, tokenizer: Tokenizer) -> Int32[np.ndarray, " n"]:
    body = tokenizer.encode(document)
    if body.size and not 0 <= body.min() <= body.max() < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer gave ids from {body.min()} to {body.max()}, outside its"
            f" vocab_size of {tokenizer.vocab_size}"
        )
    first, last = (
        np.array([] if number is None else [number], np.int32)
        for number in (tokenizer.bos_id, tokenizer.eos_id)
    )
    return np.concatenate([first, body, last])


def _read(folder: Path, split: str, dtype: np.dtype, fingerprint: str) -> Corpus:
    offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    byte_lengths = np.load(folder / "byte_lengths.npy", allow_pickle=False)
    path = folder / "tokens.bin"
    if path.stat().st_size != offsets[-1] * dtype.itemsize:
        raise ConfigError(f"data.cache_dir: {folder} is damaged; delete it")
    if not offsets[-1]:
        raise ConfigError(f"data.files: the documents of split {split!r} are all empty")
    tokens = np.memmap(path, dtype, mode="r")
    return Corpus(split, tokens, byte_lengths, offsets, fingerprint)


def _smallest_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.min_scalar_type(tokenizer.vocab_size - 1)
