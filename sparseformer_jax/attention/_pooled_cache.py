"""What decoding keeps for gates: pooled keys of blocks.

Beside keys and values of all tokens, the last P keys before their rotation. A block is pooled,
projected and turned, by the position of its first token, when its last token comes. Blocks of
queries see their own too, so for their gates the last one is pooled as far as it goes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax import mesh
from sparseformer_jax.attention import _cache
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention._gates import BlockGate, pool
from sparseformer_jax.attention.inputs import Inputs
from sparseformer_jax.model.config import ModelConfig

# Logical axes of what is none of `Inputs`. Where each query head has a pooled key of its own it is
# divided just so.
AXES: Mapping[str, tuple[str | None, ...]] = {"block_key": ("batch", None, "kv_heads", None)}

_OPEN = "unrotated_key"


def empty(config: ModelConfig, gate: BlockGate, tokens: tuple[int, int, int]) -> Cache:
    """Returns the empty cache of R layers, B sequences and S tokens, over the mesh if any.

    Args:
      config: of the model.
      gate: of the layers; it says how many keys a block has.
      tokens: R, B and S.
    """
    size, (layers, batch, length) = gate.options.block_size, tokens
    heads, _, dim = gate.key.shape[-3:]  # layers that scan are stacked in front
    shape = (layers, batch, -(-length // size), heads, dim)
    blocks = {"block_key": jnp.zeros(shape, config.dtypes[1])}
    if mesh.is_active():
        blocks = jax.tree.map(jax.reshard, blocks, _cache.partition(blocks, AXES))
    last = _cache.empty((_OPEN,), config, (layers, batch, size))
    return _cache.empty(_cache.KEYS, config, tokens) | last | blocks


def write(
    cache: Cache, gate: BlockGate, inputs: Inputs, start: Int[Array, " B"], layer: Any
) -> Cache:
    """Returns the cache with more tokens in a layer, and the blocks that they end or are in."""
    tokens = {name: cache[name] for name in _cache.KEYS}
    tokens = _cache.write(tokens, inputs, start, layer)
    size = gate.options.block_size
    seen, _, last = _cache.push({_OPEN: cache[_OPEN]}, inputs, start, layer, size)
    end = start[:, None] + jnp.sum(inputs.weights[0] > 0, axis=1, keepdims=True)
    is_token = seen.positions[1] < end
    pooled = pool(seen.unrotated_key, size, gate.options.key_pools, is_token)
    positions = seen.positions[1][:, ::size]
    keys = gate.keys(pooled, positions)
    needed = 1 if gate.options.gates == "prefill" else size
    is_new = (start[:, None] < positions + size) & (positions + needed <= end)
    kept = cache["block_key"]
    # What is not new goes to places that do not exist, and so is dropped.
    places = jnp.where(is_new, positions // size, kept.shape[2] + jnp.arange(keys.shape[1]))
    rows = jnp.arange(len(start))[:, None]
    target = kept.at[layer, rows, places]
    blocks = target.set(keys.astype(kept.dtype), unique_indices=True, mode="drop")
    return tokens | last | {"block_key": blocks}


def gather(
    cache: Cache, chosen: Bool[Array, "B K J"], size: int, most: int, layer: Any
) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K H"], Int[Array, "B K C"]]:
    """Returns keys, values and positions of the chosen blocks; -1 where none is chosen.

    Args:
      cache: of the tokens.
      chosen: blocks of each key/value head.
      size: P, tokens in a block.
      most: blocks that are chosen of any head.
      layer: which of the layers.
    """
    length = cache["key"].shape[2]
    if most == chosen.shape[-1]:  # any may be chosen, so all are read as they lie
        is_one = jnp.repeat(chosen, size, axis=-1)[..., :length]
        key, value = (cache[name][layer] for name in _cache.KEYS)
        return key, value, jnp.where(is_one, jnp.arange(length), -1)
    is_one, block = jax.lax.top_k(chosen.astype(jnp.int32), most)
    places = block[..., None] * size + jnp.arange(size)
    places = jnp.where(is_one[..., None] > 0, places, -1).reshape(*chosen.shape[:2], -1)
    rows, heads = (jnp.arange(n) for n in chosen.shape[:2])
    at = (layer, rows[:, None, None], jnp.clip(places, 0, length - 1), heads[:, None])
    key, value = (cache[name].at[at].get().swapaxes(1, 2) for name in _cache.KEYS)
    return key, value, jnp.where(places < length, places, -1)
