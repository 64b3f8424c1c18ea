"""The tokens of a split: computed once, kept as memory-mapped arrays."""

import dataclasses
import functools
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt
from ml_collections import ConfigDict

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.cache import built_once, cache_root
from sparseformer_jax.data.pieces import Piece
from sparseformer_jax.data.progress import byte_bar
from sparseformer_jax.data.stored import StoredText
from sparseformer_jax.data.text import make_text
from sparseformer_jax.data.tokenizer import Tokenizer

_FORMAT = 2  # of the files below; a change makes new ones

_BATCH_BYTES = 2**21  # of text for each core: what is encoded at once bounds the memory


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of a split in one flat array of tokens.

    A document is its tokenizer's `bos_id`, its text and `eos_id`, where there are such.
    The pieces of a long one (`pieces.PIECE_BYTES`) are encoded one by one.

    Attributes:
      split: Name of the split.
      tokens: All documents, memory-mapped.
      offsets: Where each document begins in `tokens`, in the order to read them in.
      lengths: Tokens of each document.
      byte_lengths: UTF-8 bytes of each document's text.
      fingerprint: Equal for the same text under the same tokenizer.
    """

    split: str
    tokens: UInt[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " documents"]
    lengths: Int64[np.ndarray, " documents"]
    byte_lengths: Int64[np.ndarray, " documents"]
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
        return self.num_tokens - int(np.count_nonzero(self.lengths))

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

    name = f"{fingerprint[:32]}-{split}"
    folder = built_once(
        cache_root(data.cache_dir) / "tokens" / name,
        lambda folder: _write(folder, split, text.documents(split), tokenizer),
    )
    return _read(folder, split, _smallest_dtype(tokenizer), fingerprint)


def _write(folder: Path, split: str, documents: StoredText, tokenizer: Tokenizer) -> None:
    dtype = _smallest_dtype(tokenizer)
    first, last = (
        np.array([] if number is None else [number], np.int32)
        for number in (tokenizer.bos_id, tokenizer.eos_id)
    )
    lengths, byte_lengths = array("q"), array("q")
    with (folder / "tokens.bin").open("wb") as stream:

        def put(ids: Int32[np.ndarray, " n"]) -> None:
            stream.write(ids.astype(dtype).data)
            lengths[-1] += len(ids)

        for piece, ids in _encoded(documents, f"tokenising {split}", tokenizer):
            if piece.begins:
                if lengths:
                    put(last)
                lengths.append(0)
                byte_lengths.append(0)
                put(first)
            put(ids)
            byte_lengths[-1] += len(piece.text)
        put(last)
    order = slice(None) if documents.order is None else documents.order
    columns = {"lengths": np.array(lengths), "byte_lengths": np.array(byte_lengths)}
    columns["offsets"] = np.cumsum(columns["lengths"]) - columns["lengths"]
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column[order].astype(np.int64))


def _encoded(
    documents: StoredText, title: str, tokenizer: Tokenizer
) -> Iterator[tuple[Piece, Int32[np.ndarray, " n"]]]:
    with byte_bar(title, documents.num_bytes) as bar:
        for pieces in _batches(documents.pieces(bar), _BATCH_BYTES * (os.cpu_count() or 1)):
            texts = [piece.text.decode() for piece in pieces]
            for piece, ids in zip(pieces, tokenizer.encode_batch(texts), strict=True):
                _check_ids(ids, tokenizer)
                yield piece, ids


def _batches(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    batch, batch_size = [], 0
    for piece in pieces:
        batch.append(piece)
        batch_size += len(piece.text)
        if batch_size >= size:
            yield batch
            batch, batch_size = [], 0
    yield batch


def _check_ids(ids: Int32[np.ndarray, " n"], tokenizer: Tokenizer) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer gave ids from {ids.min()} to {ids.max()}, outside its"
            f" vocab_size of {tokenizer.vocab_size}"
        )


def _read(folder: Path, split: str, dtype: np.dtype, fingerprint: str) -> Corpus:
    offsets, lengths, byte_lengths = (
        np.load(folder / f"{name}.npy", allow_pickle=False)
        for name in ("offsets", "lengths", "byte_lengths")
    )
    path = folder / "tokens.bin"
    if path.stat().st_size != lengths.sum() * dtype.itemsize:
        raise ConfigError(f"data.cache_dir: {folder} is damaged; delete it")
    if not lengths.any():
        raise ConfigError(f"data.files: the documents of split {split!r} are all empty")
    tokens = np.memmap(path, dtype, mode="r")
    return Corpus(split, tokens, offsets, lengths, byte_lengths, fingerprint)


def _smallest_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.min_scalar_type(tokenizer.vocab_size - 1)
