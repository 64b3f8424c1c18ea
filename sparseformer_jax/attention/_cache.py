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
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import targets
from sparseformer_jax import mesh
from sparseformer_jax.attention.inputs import Inputs, spec_of
from sparseformer_jax.model.config import ModelConfig

Cache = dict[str, jax.Array]

KEYS = ("key", "value")
_OF_QUERIES = frozenset({"x", "unrotated_query"})

_CHUNK = 128  # places read at once: enough work for a product, little beyond what is written


def fields(needs: Iterable[str], *, gathers_keys: bool) -> tuple[str, ...]:
    """Returns which arrays of `Inputs` a method's cache holds.

    Keys and values, and what else the method reads of keys. One that does not gather keys needs
    as many queries, so those are kept too, with what it reads of them.
    """
    of_keys = (*KEYS, *sorted(set(needs) - _OF_QUERIES))
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
    kept = {name: x[layer] for name, x in cache.items()}
    batch, size = kept["key"].shape[:2]
    positions = jnp.broadcast_to(jnp.arange(size), (batch, size))
    return over(inputs, kept, positions, positions < start[:, None] + inputs.query.shape[1])


def over(
    inputs: Inputs, kept: Cache, positions: Int[Array, "B S"], is_token: Bool[Array, "B S"]
) -> Inputs:
    """Returns inputs over other keys, and as many queries if they are kept, of which some are."""
    of_keys = (
        positions,
        is_token.astype(jnp.int32),
        jnp.ones(positions.shape, jnp.float32),
    )
    own = inputs.positions[0]
    of_queries = of_keys if "query" in kept else (own, jnp.ones_like(own), inputs.weights[0])
    names = ("positions", "segment_ids", "weights")
    tokens = dict(zip(names, zip(of_queries, of_keys, strict=True), strict=True))
    return dataclasses.replace(inputs, **kept, **tokens)


def push(
    cache: Cache, inputs: Inputs, start: Int[Array, " B"], layer: Any, unit: int
) -> tuple[Inputs, Int[Array, " B"], Cache]:
    """Writes tokens of which the last may take the places of what the first still see.

    Returns inputs of these queries over what was kept before and their own keys, in order, where
    each row's queries start among those, and the cache. The position of the first key, which may
    be below 0, is a multiple of `unit` tokens, so that blocks of the keys are the sequence's.
    """
    size, num_queries = next(iter(cache.values())).shape[2], inputs.query.shape[1]
    rows, first = jnp.arange(len(start))[:, None], start[:, None]

    def lies(index: jax.Array) -> jax.Array:
        """Where tokens lie in the kept and the new ones together, by number from the first new."""
        return jnp.where(index < 0, (first + index) % size, size + index)

    before = -(-size // unit) * unit
    offset = before + start % unit
    index = jnp.arange(before + unit - 1 + num_queries) - offset[:, None]
    seen, written = {}, {}
    for name, kept in cache.items():
        both = [kept[layer], getattr(inputs, name).astype(kept.dtype)]
        joined = jnp.concatenate(both, axis=1)
        seen[name] = joined[rows, lies(jnp.minimum(index, num_queries - 1))]
        written[name] = kept.at[layer].set(joined[rows, lies(last_written(inputs, start, size))])
    is_token = (0 <= first + index) & (index < num_queries)
    return over(inputs, seen, first + index, is_token), offset, written


def last_written(inputs: Inputs, start: Int[Array, " B"], size: int) -> Int[Array, "B S"]:
    """Returns which token the places of a ring hold in the end, by number from the first new."""
    last = jnp.sum(inputs.weights[0] > 0, axis=1, keepdims=True) - 1
    return last - (start[:, None] + last - jnp.arange(size)) % size


def chunk_width(size: int) -> int:
    """Returns how many of the places are read at once.

    Off the CPU a loop of unknown length waits for the host, so there it is all of them.
    """
    return min(_CHUNK, size) if targets.current().platform == "cpu" else size


def read_chunk(
    cache: Cache, names: tuple[str, str], layer: Any, index: Any
) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K H"], Int[Array, " C"]]:
    """Returns keys, values and their places; -1 where it was of the chunk before."""
    size = cache[names[0]].shape[2]
    width = chunk_width(size)
    first = jnp.minimum(index * width, size - width)  # the last chunk reaches into the one before
    key, value = (
        jax.lax.dynamic_slice_in_dim(
            jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False), first, width, axis=1
        )
        for name in names
    )
    places = first + jnp.arange(width)
    return key, value, jnp.where(index * width <= places, places, -1)
