"""Batches on the devices: drawn from the data pipeline, placed over the mesh."""

import jax
import numpy as np
from ml_collections import ConfigDict

from sparseformer_jax import data, mesh

DeviceBatch = dict[str, jax.Array]


class TrainBatches:
    """Endless training batches [A, B/A, T], A accumulation pieces, sharded over the mesh.

    Each process reads the rows of its own devices, and all together read what one
    process would.

    Args:
      config: of the run.
      corpus: the training text.
      device_mesh: where the batches go.
      examples: how many of the run were drawn already, in batches of whichever size.

    Attributes:
      examples: how many were drawn; the position in the data, the same on every process.
    """

    def __init__(
        self,
        config: ConfigDict,
        corpus: data.Corpus,
        device_mesh: jax.sharding.Mesh,
        examples: int = 0,
    ) -> None:
        self.examples, self._batch_size = examples, config.train.batch_size
        self._pieces = config.train.accumulation_steps
        self._sharding = jax.NamedSharding(device_mesh, mesh.spec(None, "batch", "seq"))
        self._iterator = data.train_iterator(
            corpus,
            seq_len=config.data.seq_len,
            batch_size=config.train.batch_size // self._pieces,
            seed=config.seed,
            shuffle=config.data.shuffle,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            first_example=examples,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def __next__(self) -> DeviceBatch:
        pieces = [next(self._iterator) for _ in range(self._pieces)]
        self.examples += self._batch_size
        stacked = {name: np.stack([piece[name] for piece in pieces]) for name in pieces[0]}
        return place(stacked, self._sharding)

    def close(self) -> None:
        """Ends the reading threads."""
        self._iterator.close()


def place(batch: data.Batch, sharding: jax.NamedSharding) -> DeviceBatch:
    """Returns this process's rows as its part of global arrays."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
