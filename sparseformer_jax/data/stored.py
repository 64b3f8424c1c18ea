"""Reads the documents of a prepared tfds data set, without TensorFlow."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import tensorflow_datasets as tfds
from tqdm import tqdm

_Item = TypeVar("_Item")

_READ_AT_ONCE = 256  # reading records one by one takes twice as long


class StoredText:
    """The documents of one split, in their stored order.

    Args:
      builder: A prepared data set in array_record.
      split: A split that it has.
      field: The feature that holds the text.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, field: str) -> None:
        self._examples = builder.as_data_source(split, file_format="array_record")
        self._field = field

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _READ_AT_ONCE):
            stop = min(start + _READ_AT_ONCE, len(self))
            for example in self._examples.__getitems__(range(start, stop)):
                yield example[self._field].decode()


def show_progress(documents: Iterable[_Item], title: str) -> Iterator[_Item]:
    """Yields `documents`; after three seconds a terminal shows how many."""
    # `disable=None`: only on a terminal.
    yield from tqdm(documents, title, unit=" documents", delay=3, disable=None, leave=False)
