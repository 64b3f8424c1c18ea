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

    Attributes:
      corpus: fingerprint of the text and its tokenizer.
    """

    def __init__(
        self, config: ConfigDict, corpus: data.Corpus, device_mesh: jax.sharding.Mesh
    ) -> None:
        self.corpus = corpus.fingerprint
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
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def __next__(self) -> DeviceBatch:
        pieces = [next(self._iterator) for _ in range(self._pieces)]
        stacked = {name: np.stack([piece[name] for piece in pieces]) for name in pieces[0]}
        return place(stacked, self._sharding)

    def get_state(self) -> dict[str, int]:
        """Returns the position in the data, the same on every process."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position, whichever number of processes it was saved by."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the reading threads."""
        self._iterator.close()


def place(batch: data.Batch, sharding: jax.NamedSharding) -> DeviceBatch:
    """Returns this process's rows as its part of global arrays."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
