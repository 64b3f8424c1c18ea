"""Sums over the evaluated windows of a split."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from sparseformer_jax import data, mesh
from sparseformer_jax.training.batches import DeviceBatch, place


@dataclasses.dataclass(frozen=True)
class Losses:
    """What was measured over all evaluated windows.

    Attributes:
      nll: sum over windows of the loss at each position in them, in nats.
      tokens: how many were predicted there, by weight.
      diagnostics: of the layers that report them, by name, means over tokens.
    """

    nll: Float[np.ndarray, " T"]
    tokens: Float[np.ndarray, " T"]
    diagnostics: Mapping[str, Float[np.ndarray, " L"]] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> Float[np.ndarray, " T"]:
        """Bits per token at each position; nan: nothing was predicted."""
        with np.errstate(invalid="ignore"):
            return self.nll / self.tokens / math.log(2)


def over_batches(
    config: ConfigDict, corpus: data.Corpus, step: Callable[[DeviceBatch], Any]
) -> Any:
    """Returns what `step` returns of each batch, a tree of arrays, summed in float64.

    Args:
      config: its `eval` section says which batches, the first ones of the split, in order.
      corpus: the split.
      step: called with batches on the devices, compiled.
    """
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec("batch", "seq"))
    batches = data.eval_batches(
        corpus,
        seq_len=config.data.seq_len,
        batch_size=config.eval.batch_size,
        num_batches=config.eval.num_batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    quiet = not (mesh.is_primary() and sys.stderr.isatty())
    found = []
    for batch in tqdm(batches, desc="evaluate", unit="batch", leave=False, disable=quiet):
        found.append(step(place(batch, sharding)))
        # Read one batch late, so that the device never waits for the host.
        found[-2:-1] = jax.device_get(found[-2:-1])

    def summed(*values: Any) -> np.ndarray:
        return np.asarray(np.sum(np.stack(values), axis=0, dtype=np.float64))

    return jax.tree.map(summed, *jax.device_get(found))
