"""What pictures of a trained model show: where its tokens look, and what that is worth.

Loss and density are of all evaluated windows, weights of the start of the first one, as there
are T^2 of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from sparseformer_jax import data
from sparseformer_jax.evaluation import sums
from sparseformer_jax.model.loss import cross_entropy
from sparseformer_jax.model.transformer import Block
from sparseformer_jax.training.batches import DeviceBatch
from sparseformer_jax.training.state import ModelDef, TrainState

MAX_TOKENS = 512  # of the window whose weights are shown
_MAX_TILES = 64  # a side


@dataclasses.dataclass(frozen=True)
class Losses:
    """What was measured over all evaluated windows.

    Attributes:
      bits: loss of each position in the window, bits per token; nan: nothing was predicted.
      tokens: how many were predicted there, by weight.
      density: of each layer that reports it, the mean over tokens.
    """

    bits: Float[np.ndarray, " T"]
    tokens: Float[np.ndarray, " T"]
    density: Float[np.ndarray, " L"]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which pairs of a window have a weight, layer by layer.

    Attributes:
      num_tokens: of the window.
      tile_size: tokens a side of a tile.
      layers: of each layer by kind, the fraction of pairs [N, M, M] of every tile.
    """

    num_tokens: int
    tile_size: int
    layers: list[dict[str, Float[np.ndarray, "N M M"]]]


def measure(
    config: ConfigDict, model_def: ModelDef, corpus: data.Corpus, state: TrainState
) -> Losses:
    """Returns loss by position and density by layer, in one pass over the split."""
    step = functools.partial(jax.jit(_make_step(model_def)), state)
    found = sums.over_batches(config, corpus, step)
    tokens = found["tokens"]
    with np.errstate(invalid="ignore"):
        bits = found["nll"] / tokens / math.log(2)
    return Losses(bits, tokens, found["density"] / tokens.sum())


def _make_step(
    model_def: ModelDef,
) -> Callable[[TrainState, DeviceBatch], dict[str, jax.Array]]:
    """The function (state, batch) -> sums of nats and tokens [T], of density [L]."""

    def step(state: TrainState, batch: DeviceBatch) -> dict[str, jax.Array]:
        model = model_def.model(state.params, state.variables, state.step)
        output = model.features(batch["inputs"], batch["positions"], batch["segment_ids"])

        def loss(weights: jax.Array) -> jax.Array:
            return cross_entropy(model, output.hidden, batch["targets"], weights)[0]

        # The loss is linear in the weights: its gradient is the loss of each token.
        weights = batch["weights"]
        nll = jax.grad(loss)(weights)
        density = output.diagnostics.get("density", jnp.ones(0))
        found = {
            "nll": jnp.sum(weights * nll, axis=0),
            "tokens": jnp.sum(weights, axis=0),
            "density": jnp.sum(weights) * density,
        }
        return jax.tree.map(_whole, found)

    return step


def on_host(state: TrainState) -> TrainState:
    """Returns the state's parameters and variables whole, in the memory of every process."""

    def fetched(variables: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        # One at a time: a device need not hold the model.
        return {name: jax.device_get(_replicated(x)) for name, x in variables.items()}

    return TrainState(int(state.step), fetched(state.params), fetched(state.variables))


def kept_pairs(
    config: ConfigDict, model_def: ModelDef, corpus: data.Corpus, state: TrainState
) -> Kept:
    """Returns which pairs the layers give a weight above 0, in the first evaluated window.

    Args:
      config: of the run.
      model_def: of the model.
      corpus: whose first tokens are the window, at most 512.
      state: `on_host`. There is no mesh here: one device holds a layer at a time.
    """
    (batch,) = data.eval_batches(
        corpus, seq_len=min(MAX_TOKENS, config.data.seq_len), batch_size=1, num_batches=1
    )
    num_tokens = int(np.flatnonzero(batch["weights"][0])[-1]) + 1  # what follows is padding
    names = ("inputs", "positions", "segment_ids")
    tokens, positions, segment_ids = (jnp.asarray(batch[name][:, :num_tokens]) for name in names)
    params = {
        name: x if name.startswith("stacks/") else jnp.asarray(x)  # layers go one by one
        for name, x in state.params.items()
    }
    model = model_def.model(params, state.variables, state.step)
    x = model.embed(tokens, positions)
    tile_size = -(-num_tokens // _MAX_TILES)
    layers = []
    for block in model.blocks():
        x, kept = _layer(*nnx.split(block), x, positions, segment_ids, state.step)
        layers.append({kind: tiles(np.asarray(k), tile_size) for kind, k in kept.items()})
    return Kept(num_tokens, tile_size, layers)


@functools.partial(jax.jit, static_argnums=0)
def _layer(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    step: Any,
) -> tuple[jax.Array, dict[str, Bool[Array, "N T T"]]]:
    """The residual stream after a layer, and which pairs have a weight, by kind."""
    block: Block = nnx.merge(graphdef, state)
    seen = block.attention_norm(x)
    weights = block.attention.weights_by_kind(seen, positions, segment_ids, step=step)
    x, _ = block(x, positions, segment_ids, None, step)
    return x, {kind: weight[0] > 0 for kind, weight in weights.items()}


def tiles(kept: Bool[np.ndarray, "N T T"], size: int) -> Float[np.ndarray, "N M M"]:
    """Returns the fraction of the pairs of each tile that are kept; the last may be smaller."""
    starts = np.arange(0, kept.shape[1], size)
    counts = np.add.reduceat(kept.astype(np.float32), starts, axis=1)
    counts = np.add.reduceat(counts, starts, axis=2)
    lengths = np.diff(np.append(starts, kept.shape[1]))
    return counts / np.outer(lengths, lengths)


def _replicated(x: jax.Array) -> jax.Array:
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))


def _whole(x: jax.Array) -> jax.Array:
    return jax.reshard(x, PartitionSpec())
