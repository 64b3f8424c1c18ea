"""What a layer keeps of the tokens before: written once, read by every token after them.

Layers that scan share a cache, arrays [R, B, S, ..]. Row b of size S holds the last S tokens of
one sequence, position p at place p mod S: all of them, if the method does not say that it forgets.
What lies beyond the last that was written is another document to attention.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import targets
from sparseformer_jax import mesh
from sparseformer_jax.attention.inputs import Inputs, spec_of
from sparseformer_jax.model.config import ModelConfig

Cache = dict[str, jax.Array]

_KEYS = ("key", "value")
_OF_QUERIES = frozenset({"x", "unrotated_query"})

_CHUNK = 128  # places read at once: enough work for a product, little beyond what is written


def fields(needs: Iterable[str], *, gathers_keys: bool) -> tuple[str, ...]:
    """Returns which arrays of `Inputs` a method's cache holds.

    Keys and values, and what else the method reads of keys. One that does not gather keys needs
    as many queries, so those are kept too, with what it reads of them.
    """
    of_keys = (*_KEYS, *sorted(set(needs) - _OF_QUERIES))
    return of_keys if gathers_keys else (*of_keys, "query", *sorted(_OF_QUERIES & set(needs)))


def empty(names: Iterable[str], config: ModelConfig, tokens: tuple[int, int, int]) -> Cache:
    """Returns arrays of R layers, B sequences and S tokens, [R, B, S, ..], over the mesh if any."""
    of_heads = {"query", "unrotated_query"}

    def zeros(name: str) -> jax.Array:
        num_heads = config.num_heads if name in of_heads else config.num_kv_heads
        entries = (config.embed_dim,) if name == "x" else (num_heads, config.head_dim)
        return jnp.zeros((*tokens, *entries), config.dtypes[1])

    cache = {name: zeros(name) for name in names}
    return jax.tree.map(jax.reshard, cache, partition(cache, {})) if mesh.is_active() else cache


def partition(
    names: Iterable[str], axes: Mapping[str, Sequence[str | None]]
) -> dict[str, PartitionSpec]:
    """Returns how the arrays of a cache are divided over the mesh.

    Args:
      names: of the arrays.
      axes: logical ones of those that are none of `Inputs`, from the batch on.
    """

    def spec(name: str) -> PartitionSpec:
        return mesh.spec(*axes[name]) if name in axes else spec_of(name)

    return {name: PartitionSpec(None, *spec(name)) for name in names}


def weights(
    x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B T"] | None:
    """Returns 1 for each sequence's first tokens, 0 for those that fill its row up; None: all 1."""
    if lengths is None:
        return None
    return (jnp.arange(x.shape[1]) < lengths[:, None]).astype(jnp.float32)


def write(cache: Cache, inputs: Inputs, start: Int[Array, " B"], layer: Any) -> Cache:
    """Returns the cache with more tokens in a layer, those that count: row b's from start[b] on."""
    size = cache["key"].shape[2]
    rows, index = jnp.arange(len(start))[:, None], jnp.arange(inputs.query.shape[1])
    count = jnp.sum(inputs.weights[0] > 0, axis=1, keepdims=True)
    is_kept = (index < count) & (count - size <= index)
    # What is not kept goes to places that do not exist, and so is dropped.
    places = jnp.where(is_kept, (start[:, None] + index) % size, size + index)

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        # One at a time in place, where a slice of the layer would be copied whole.
        target = kept.at[layer, rows, places]
        return target.set(new.astype(kept.dtype), unique_indices=True, mode="drop")

    return {name: put(kept, getattr(inputs, name)) for name, kept in cache.items()}


def read(cache: Cache, inputs: Inputs, start: Int[Array, " B"], layer: Any) -> Inputs:
    """Returns inputs of T queries, or of as many as keys, over all keys of a layer's cache."""
    cache = {name: x[layer] for name, x in cache.items()}
    batch, size = cache["key"].shape[:2]
    num_queries = inputs.query.shape[1]
    index = jnp.broadcast_to(jnp.arange(size), (batch, size))
    is_written = (index < start[:, None] + num_queries).astype(jnp.int32)
    ones = jnp.ones((batch, size), jnp.float32)
    if "query" in cache:
        of_queries = index, is_written, ones
    else:
        of_queries = (
            inputs.positions[0],
            jnp.ones((batch, num_queries), jnp.int32),
            inputs.weights[0],
        )
    positions, segment_ids, weights = zip(of_queries, (index, is_written, ones), strict=True)
    return dataclasses.replace(
        inputs, **cache, positions=positions, segment_ids=segment_ids, weights=weights
    )


def push(
    cache: Cache, inputs: Inputs, start: Int[Array, " B"], layer: Any, unit: int
) -> tuple[Inputs, Int[Array, " B"], Cache]:
    """Writes tokens of which the last may take the places of what the first still see.

    Returns inputs of these queries over what was kept before and their own keys, in order, where
    each row's queries start among those, and the cache. The position of the first key, which may
    be below 0, is a multiple of `unit` tokens, so that blocks of the keys are the sequence's.
    """
    size, num_queries = cache["key"].shape[2], inputs.query.shape[1]
    rows, first = jnp.arange(len(start))[:, None], start[:, None]

    def lies(index: jax.Array) -> jax.Array:
        """Where tokens lie in the kept and the new ones together, by number from the first new."""
        return jnp.where(index < 0, (first + index) % size, size + index)

    before = -(-size // unit) * unit
    offset = before + start % unit
    index = jnp.arange(before + unit - 1 + num_queries) - offset[:, None]
    last = jnp.sum(inputs.weights[0] > 0, axis=1, keepdims=True) - 1
    held = last - (first + last - jnp.arange(size)) % size
    seen, written = {}, {}
    for name, kept in cache.items():
        both = [kept[layer], getattr(inputs, name).astype(kept.dtype)]
        joined = jnp.concatenate(both, axis=1)
        seen[name] = joined[rows, lies(jnp.minimum(index, num_queries - 1))]
        written[name] = kept.at[layer].set(joined[rows, lies(held)])
    is_token = ((0 <= first + index) & (index < num_queries)).astype(jnp.int32)
    of_keys = first + index, is_token, jnp.ones(index.shape, jnp.float32)
    of_queries = inputs.positions[0], jnp.ones_like(inputs.positions[0]), inputs.weights[0]
    positions, segment_ids, weights = zip(of_queries, of_keys, strict=True)
    tokens = {"positions": positions, "segment_ids": segment_ids, "weights": weights}
    return dataclasses.replace(inputs, **seen, **tokens), offset, written


def num_chunks(cache: Cache, start: Int[Array, " B"]) -> int | Int[Array, ""]:
    """Returns how many chunks of places hold what is written, where tokens `start` are the last."""
    size = cache["key"].shape[2]
    width = _chunk(size)
    return 1 if width == size else jnp.minimum(jnp.max(start), size - 1) // width + 1


def read_chunk(
    cache: Cache, start: Int[Array, " B"], layer: Any, index: Any
) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K H"], Int[Array, "B C"]]:
    """Returns keys, values and positions of a chunk of places; those of no token are below 0."""
    size = cache["key"].shape[2]
    width = _chunk(size)
    first = jnp.minimum(index * width, size - width)  # the last chunk reaches into the one before
    key, value = (
        jax.lax.dynamic_slice_in_dim(
            jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False), first, width, axis=1
        )
        for name in _KEYS
    )
    places = first + jnp.arange(width)
    positions = start[:, None] - (start[:, None] - places) % size  # the last written there
    return key, value, jnp.where(index * width <= places, positions, -1)


def _chunk(size: int) -> int:
    """Places of a chunk. Off the CPU a loop of unknown length waits for the host: all at once."""
    return min(_CHUNK, size) if targets.current().platform == "cpu" else size
