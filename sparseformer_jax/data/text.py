"""Turns local text into a tfds data set, or opens an installed one."""

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from tensorflow_datasets.core import shuffle

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.cache import built_once, cache_root
from sparseformer_jax.data.documents import read_documents
from sparseformer_jax.data.files import SPLITS, find_files
from sparseformer_jax.data.installed import InstalledText
from sparseformer_jax.data.stored import StoredText, show_progress


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
        folder=cache_root(data.cache_dir) / "text",
    )


class LocalTextBuilder(tfds.core.GeneratorBasedBuilder):
    """A tfds data set of documents, in array_record.

    Documents are stored in an order drawn from their contents.

    Args:
      documents: The documents of each split, in UTF-8; a split without any is left out.
      **options: Of `tfds.core.GeneratorBasedBuilder`.
    """

    name = "local_text"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, documents: Mapping[str, Iterator[bytes]], **options: Any) -> None:
        self._documents = documents
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, Any]]]:
        generators = {}
        for split, documents in self._documents.items():
            # tfds refuses an empty split with an assertion.
            first = next(documents, None)
            if first is not None:
                documents = itertools.chain([first], documents)
                generators[split] = self._generate_examples(
                    show_progress(documents, f"preparing {split}")
                )
        if not generators:
            raise ConfigError("data.files: the files hold no document at all")
        return generators

    def _generate_examples(self, documents: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
        repeats: Counter[str] = Counter()
        for document in documents:
            digest = hashlib.sha256(document).hexdigest()
            yield f"{digest}-{repeats[digest]}", {"text": document}
            repeats[digest] += 1

    # What tfds prints about a download, of which there is none.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


class LocalText:
    """The documents of local files, kept as a tfds data set.

    The same contents give the same splits and order on every machine, wherever the
    files lie and whatever they are called, except that a name can tell a split.

    Args:
      patterns: Files, folders and globs; empty: Python's standard library.
      text_field: Field of a JSON line that holds its text.
      held_out: Share of the documents in each split but train, where the files' names
        tell no splits; a document's split depends on its content alone.
      folder: Where prepared data sets are kept, each under its fingerprint.

    Raises:
      ConfigError: as `find_files`.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        text_field: str,
        held_out: Mapping[str, float],
        folder: Path,
    ) -> None:
        self._files = find_files(patterns)
        self._text_field = text_field
        self._held_out = dict(held_out)
        contents = [(file.split, file.kind, file.digest) for file in self._files]
        version = str(LocalTextBuilder.VERSION)
        key = json.dumps([version, contents, text_field, self._held_out])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()
        self._folder = folder / self.fingerprint[:32]

    def documents(self, split: str) -> StoredText:
        """Returns the documents of `split`, prepared on first use.

        Raises:
          ConfigError: as `read_documents`, or the split is empty.
        """
        folder = built_once(self._folder, self._prepare)
        builder = tfds.builder_from_directory(
            folder / LocalTextBuilder.name / str(LocalTextBuilder.VERSION)
        )
        splits = builder.info.splits
        if split not in splits:
            raise ConfigError(
                f"data.files: no document is in split {split!r}, only in"
                f" {', '.join(splits)}; add text, raise the split's share, or name a"
                f" file {split}.txt"
            )
        return StoredText(builder, split, "text")

    def _prepare(self, folder: Path) -> None:
        documents = {split: self._read(split) for split in SPLITS}
        builder = LocalTextBuilder(documents, data_dir=folder)
        tfds.disable_progress_bar()  # three at once; `show_progress` has its own
        # A split above this size tfds sorts on disk, for which it needs TensorFlow.
        shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
        builder.download_and_prepare()

    def _read(self, split: str) -> Iterator[bytes]:
        for file in self._files:
            if file.split in (None, split):
                for document in read_documents(file, self._text_field):
                    if split == (file.split or self._drawn_split(document)):
                        yield document

    def _drawn_split(self, document: bytes) -> str:
        number = int.from_bytes(hashlib.sha256(document).digest()[:8]) / 2**64
        for split, share in self._held_out.items():
            if number < share:
                return split
            number -= share
        return "train"
