"""Turns local text into a tfds data set, or opens an installed one."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from ml_collections import ConfigDict

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.cache import built_once, cache_root
from sparseformer_jax.data.digests import hash_files, stamp
from sparseformer_jax.data.documents import read_documents
from sparseformer_jax.data.files import TextFile, find_files
from sparseformer_jax.data.installed import InstalledText
from sparseformer_jax.data.pieces import Piece
from sparseformer_jax.data.progress import byte_bar
from sparseformer_jax.data.splits import bytes_if_too_few, cut_by_position, draw
from sparseformer_jax.data.stored import StoredText
from sparseformer_jax.data.writer import VERSION, TextWriter, open_text


@runtime_checkable
class TextSource(Protocol):
    """Documents in splits.

    Attributes:
      fingerprint: Equal for sources of the same documents.
    """

    fingerprint: str

    def documents(self, split: str) -> StoredText:
        """Returns the documents of `split`; raises ConfigError where it has none."""
        ...


def make_text(data: ConfigDict) -> TextSource:
    """Returns the documents that `data`, a config's data section, describes.

    Raises:
      ConfigError: `data.files` or `data.tfds_name` names nothing that can be read.
    """
    if data.tfds_name:
        return InstalledText(data.tfds_name, data.tfds_data_dir, data.text_field)
    return LocalText(
        data.files,
        text_field=data.text_field,
        held_out={"test": data.test_fraction, "validation": data.validation_fraction},
        cache=cache_root(data.cache_dir),
    )


class LocalText:
    """The documents of local files, kept as a tfds data set.

    The same contents give the same splits and order on every machine, wherever the
    files lie and whatever they are called, except that a name can tell a split.

    Args:
      patterns: Files, folders and globs; empty: Python's standard library.
      text_field: Field of a JSON line that holds its text.
      held_out: Share of the documents in each split but train, where the files' names
        tell no splits; a document's split depends on its content alone. Where that
        leaves a split without any, the text is cut by position.
      cache: Folder of prepared data sets, each under its fingerprint, and of the digests
        of files.

    Raises:
      ConfigError: as `find_files`.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        text_field: str,
        held_out: Mapping[str, float],
        cache: Path,
    ) -> None:
        files = find_files(patterns)
        self._hashed = hash_files([file.path for file in files], cache / "digests.json")
        contents = {
            file: (file.split or "", file.kind + file.compression, self._hashed[file.path].digest)
            for file in files
        }
        self._files = sorted(files, key=contents.__getitem__)
        self._text_field = text_field
        self._held_out = dict(held_out)
        ordered = [contents[file] for file in self._files]
        key = json.dumps([VERSION, ordered, text_field, self._held_out])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()
        self._folder = cache / "text" / self.fingerprint[:32]

    def documents(self, split: str) -> StoredText:
        """Returns the documents of `split`, prepared on first use.

        Raises:
          ConfigError: as `read_documents`, or the split is empty.
        """
        splits = open_text(built_once(self._folder, self._prepare))
        if split not in splits:
            raise ConfigError(
                f"data.files: no document is in split {split!r}, only in"
                f" {', '.join(splits)}; add text, raise the split's share, or name a"
                f" file {split}.txt"
            )
        return splits[split]

    def _prepare(self, folder: Path) -> None:
        writer = TextWriter(folder)
        for split, piece in self._assigned():
            writer.add(split, piece)
        if not writer.splits:
            raise ConfigError("data.files: the files hold no document at all")
        writer.close()
        for path, (before, _) in self._hashed.items():
            if stamp(path) != before:
                raise ConfigError(f"data.files: {str(path)!r} changed while it was read; try again")

    def _assigned(self) -> Iterator[tuple[str, Piece]]:
        """Yields all pieces, each with its split."""
        if self._files[0].split:
            return ((file.split or "", piece) for file, piece in self._read("preparing"))
        size = bytes_if_too_few(self._pieces("measuring"), self._held_out)
        if size is None:
            return draw(self._pieces("preparing"), self._held_out)
        shares = " and ".join(
            f"{100 * share:g}% for {split}" for split, share in self._held_out.items() if share
        )
        print(
            f"data.files: too few documents for whole ones in every split; the end of the text"
            f" is cut off: {shares}",
            file=sys.stderr,
        )
        return cut_by_position(self._pieces("preparing"), self._held_out, size)

    def _pieces(self, title: str) -> Iterator[Piece]:
        return (piece for _, piece in self._read(title))

    def _read(self, title: str) -> Iterator[tuple[TextFile, Piece]]:
        with byte_bar(title, sum(entry.stamp.size for entry in self._hashed.values())) as bar:
            for file in self._files:
                for piece in read_documents(file, self._text_field, bar):
                    yield file, piece
