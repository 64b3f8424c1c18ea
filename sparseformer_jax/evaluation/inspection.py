"""What pictures of a trained model show: where its tokens look, and what its method tells."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sparseformer_jax import data, mesh
from sparseformer_jax.attention.base import Attention
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.figures import ShownLayer
from sparseformer_jax.model.block import Block
from sparseformer_jax.training.state import ModelDef, TrainState

MAX_TOKENS = 512  # of the window whose weights are shown, as there are T^2 of them
_MAX_TILES = 64  # a side
_MAX_PAIRS = 64  # likewise, of those that are shown one by one


@dataclasses.dataclass(frozen=True)
class Window:
    """What the layers do with the start of the first evaluated window.

    Attributes:
      tokens: the text of each, T of them.
      tile_size: tokens a side of a tile.
      kept: of each layer by kind, the fraction of pairs [N, M, M] of every tile that have a
        weight above 0.
      weights: of each layer by kind, those [N, W, W] of the first tokens, at most 64.
      shares: of each layer by kind, the weight [N, T] that every query gives to its pairs.
      own: by class, what layers say of themselves, by number.
    """

    tokens: list[str]
    tile_size: int
    kept: list[dict[str, Float[np.ndarray, "N M M"]]]
    weights: list[dict[str, Float[np.ndarray, "N W W"]]]
    shares: list[dict[str, Float[np.ndarray, "N T"]]]
    own: dict[type[Attention], dict[int, ShownLayer]]


def first_window(
    config: ConfigDict, model_def: ModelDef, corpus: data.Corpus, state: TrainState
) -> Window | None:
    """Returns what the layers do with the first evaluated tokens, at most 512.

    All processes call it, on the mesh of the state. One device of the primary process holds a
    layer at a time; to the others it returns None.
    """
    state = _on_host(state)
    if not mesh.is_primary():
        return None
    with jax.set_mesh(Mesh(np.asarray(jax.local_devices()[0]), ())):
        return _look(config, model_def, corpus, state)


def _look(
    config: ConfigDict, model_def: ModelDef, corpus: data.Corpus, state: TrainState
) -> Window:
    (batch,) = data.eval_batches(
        corpus, seq_len=min(MAX_TOKENS, config.data.seq_len), batch_size=1, num_batches=1
    )
    num_tokens = int(np.flatnonzero(batch["weights"][0])[-1]) + 1  # what follows is padding
    names = ("inputs", "positions", "segment_ids")
    ids, positions, segment_ids = (jnp.asarray(batch[name][:, :num_tokens]) for name in names)
    params = {
        name: x if name.startswith("stacks/") else jnp.asarray(x)  # layers go one by one
        for name, x in state.params.items()
    }
    model = model_def.model(params, state.variables, state.step)
    x = model.embed(ids, positions)
    tile_size = -(-num_tokens // _MAX_TILES)
    tokenizer = make_tokenizer(config)
    tokens = [tokenizer.decode([i]) for i in ids[0].tolist()]
    window = Window(tokens, tile_size, [], [], [], {})
    for number, block in enumerate(model.blocks()):
        x, (weights, own) = _layer(*nnx.split(block), x, positions, segment_ids, state.step)
        weights = {kind: np.asarray(weight) for kind, weight in weights.items()}
        window.kept.append({kind: tiles(weight, tile_size) for kind, weight in weights.items()})
        start = slice(_MAX_PAIRS)
        window.weights.append({kind: weight[:, start, start] for kind, weight in weights.items()})
        window.shares.append({kind: weight.sum(-1) for kind, weight in weights.items()})
        if own:
            shown = ShownLayer(block.attention.options, jax.device_get(own))
            window.own.setdefault(type(block.attention), {})[number] = shown
    return window


@functools.partial(jax.jit, static_argnums=0)
def _layer(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    step: Any,
) -> tuple[jax.Array, tuple[dict[str, Float[Array, "N T T"]], dict[str, jax.Array]]]:
    """The residual stream after a layer; of its row the weights by kind, and what it says."""
    block: Block = nnx.merge(graphdef, state)
    seen = block.attention_norm(x)
    arguments = seen, positions, segment_ids
    shown = (
        block.attention.weights_by_kind(*arguments, step=step),
        block.attention.inspect(*arguments, step=step),
    )
    x, _ = block(x, positions, segment_ids, None, step)
    return x, jax.tree.map(lambda array: array[0], shown)


def tiles(weights: Float[np.ndarray, "N T T"], size: int) -> Float[np.ndarray, "N M M"]:
    """Returns the fraction of each tile's pairs with a weight above 0; the last may be smaller."""
    starts = np.arange(0, weights.shape[1], size)
    counts = np.add.reduceat((weights > 0).astype(np.float32), starts, axis=1)
    counts = np.add.reduceat(counts, starts, axis=2)
    lengths = np.diff(np.append(starts, weights.shape[1]))
    return counts / np.outer(lengths, lengths)


def _on_host(state: TrainState) -> TrainState:
    """The state's parameters and variables whole, in the memory of every process."""

    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    def whole(x: jax.Array) -> np.ndarray:
        # What other processes hold comes through the devices, an array at a time.
        return jax.device_get(x if x.is_fully_addressable else jax.device_put(x, everywhere))

    def fetched(variables: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        return {name: whole(x) for name, x in variables.items()}

    return TrainState(int(state.step), fetched(state.params), fetched(state.variables))
