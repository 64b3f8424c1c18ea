"""Writes documents as a tfds data set in array_record: in one pass, in bounded memory."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from sparseformer_jax.data.files import SPLITS
from sparseformer_jax.data.pieces import Piece
from sparseformer_jax.data.stored import StoredText

VERSION = "2.0.0"

_FEATURES = {"text": tfds.features.Text(), "continues": np.bool_}
_BUFFER_BYTES = 2**23
_RECORDS_IN_A_FILE = 2**20


class TextWriter:
    """Writes the pieces of documents, each to its split, in the order they come.

    Only digests of the documents stay in memory, from which `close` draws the order they
    are read in: it depends on the documents' contents, not on the order they came in.

    Args:
      folder: An empty folder; what is written there `open_text` reads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        identity = DatasetIdentity("local_text", tfds.core.Version(VERSION), str(folder), __name__)
        features = tfds.features.FeaturesDict(_FEATURES)
        self._writer = tfds.core.SequentialWriter(
            tfds.core.DatasetInfo(builder=identity, features=features),
            max_examples_per_shard=_RECORDS_IN_A_FILE,
            file_format="array_record",
        )
        self._buffer: dict[str, list[Any]] = {}
        self._buffered = 0
        self._digests: dict[str, bytearray] = {}

    @property
    def splits(self) -> list[str]:
        """The splits that have a document."""
        return list(self._digests)

    def add(self, split: str, piece: Piece) -> None:
        """Writes a piece; raises OSError where the disk is full."""
        if piece.begins:
            digest = hashlib.sha256(piece.text).digest()
            self._digests.setdefault(split, bytearray()).extend(digest)
        record = {"text": piece.text, "continues": not piece.begins}
        self._buffer.setdefault(split, []).append(record)
        self._buffered += len(piece.text)
        if self._buffered >= _BUFFER_BYTES:
            self._flush()

    def close(self) -> None:
        """Writes what is left, and the order; raises OSError where the disk is full."""
        self._flush()
        try:
            self._writer.close_all()
        except RuntimeError as error:
            raise _disk_error(error) from error
        for split, digests in self._digests.items():
            np.save(_order_file(self._folder, split), _drawn_order(bytes(digests), split))

    def _flush(self) -> None:
        try:
            self._writer.initialize_splits(list(self._buffer), fail_if_exists=False)
            self._writer.add_examples(self._buffer)
        except RuntimeError as error:
            raise _disk_error(error) from error
        self._buffer, self._buffered = {}, 0


def open_text(folder: Path) -> dict[str, StoredText]:
    """Returns the documents of each split that a `TextWriter` wrote to `folder`."""
    builder = tfds.builder_from_directory(folder)
    return {
        split: StoredText(
            builder,
            split,
            "text",
            continues="continues",
            order=np.load(_order_file(folder, split), allow_pickle=False),
        )
        for split in SPLITS
        if split in builder.info.splits
    }


def _order_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.order.npy"


def _disk_error(error: RuntimeError) -> OSError:
    # array_record tells the system's reason first, then where its own code stood.
    return OSError(str(error).partition(";")[0])


def _drawn_order(digests: bytes, split: str) -> Int64[np.ndarray, " documents"]:
    """Returns the order by a hash of each document's digest and its number among equals."""
    # Numpy compares fixed strings of bytes without their zeros at the end, which changes nothing.
    rows = np.frombuffer(digests, "S32")
    grouped = np.argsort(rows, kind="stable")
    is_first = np.concatenate([[True], rows[grouped[1:]] != rows[grouped[:-1]]])
    positions = np.arange(len(rows))
    repeats = np.empty_like(positions)
    repeats[grouped] = positions - np.maximum.accumulate(np.where(is_first, positions, 0))
    salted = hashlib.md5(split.encode())
    keys = bytearray()
    for i, repeat in enumerate(repeats):
        key = salted.copy()
        key.update(f"{digests[32 * i : 32 * i + 32].hex()}-{repeat}".encode())
        keys += key.digest()
    return np.argsort(np.frombuffer(keys, "S16"), kind="stable")
