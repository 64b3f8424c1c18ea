"""The texts that are evaluated: documents of files, or of a split of the config's data."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data import make_text
from sparseformer_jax.data.documents import read_documents
from sparseformer_jax.data.files import text_file
from sparseformer_jax.data.pieces import Piece


def of_files(data: ConfigDict, files: Sequence[Path]) -> dict[str, list[str]]:
    """Returns the documents of each file: its JSON lines, or all of it.

    Args:
      data: a config's data section, whose `text_field` JSON lines have.
      files: of UTF-8; names that end in .gz or .xz are decompressed.

    Raises:
      ConfigError: one cannot be read.
    """
    found = {}
    for file in files:
        if not file.is_file():
            raise ConfigError(f"--files={file}: there is no such file")
        found[str(file)] = list(_documents(read_documents(text_file(file), data.text_field)))
    return found


def of_split(data: ConfigDict, split: str) -> dict[str, list[str]]:
    """Returns the documents of a split of `data.files` or `data.tfds_name`, as they are stored.

    Raises:
      ConfigError: there is no such split, or the text cannot be read.
    """
    return {split: list(_documents(make_text(data).documents(split).pieces()))}


def _documents(pieces: Iterable[Piece]) -> Iterator[str]:
    parts: list[bytes] = []
    for piece in pieces:
        if piece.begins and parts:
            yield b"".join(parts).decode()
            parts = []
        parts.append(piece.text)
    if parts:
        yield b"".join(parts).decode()
