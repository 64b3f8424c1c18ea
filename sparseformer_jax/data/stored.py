"""Reads the documents of a prepared tfds data set, without TensorFlow."""

import io
from collections.abc import Iterator

import tensorflow_datasets as tfds
from jaxtyping import Int64
from numpy import ndarray
from tqdm import tqdm

from sparseformer_jax.data.pieces import Piece, cut

_READ_AT_ONCE = 64  # reading records one by one takes twice as long


class StoredText:
    """The documents of one split in pieces, as they are stored.

    Args:
      builder: A prepared data set in array_record.
      split: A split that it has.
      field: The feature that holds the text.
      continues: The feature that tells whether a record continues the document of the one
        before; "": each record is a document.
      order: As the attribute.

    Attributes:
      num_bytes: Bytes of the stored records.
      order: The order to take the documents in, by their number; None: as stored.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        field: str,
        continues: str = "",
        order: Int64[ndarray, " documents"] | None = None,
    ) -> None:
        self._examples = builder.as_data_source(split, file_format="array_record")
        self._field, self._continues = field, continues
        # A plain number: tfds' own cannot be added to a fraction.
        self.num_bytes = int(builder.info.splits[split].num_bytes)
        self.order = order

    def pieces(self, bar: tqdm | None = None) -> Iterator[Piece]:
        """Yields the documents in pieces; moves `bar`, of `num_bytes`, as it reads."""
        count = len(self._examples)
        for start in range(0, count, _READ_AT_ONCE):
            stop = min(start + _READ_AT_ONCE, count)
            for example in self._examples.__getitems__(range(start, stop)):
                begins = not (self._continues and example[self._continues])
                for piece in cut(io.BytesIO(example[self._field])):
                    yield Piece(piece.text, begins and piece.begins)
            if bar is not None:
                # As if all records were of one size: their own sizes are not told.
                bar.update(self.num_bytes * stop // count - self.num_bytes * start // count)
