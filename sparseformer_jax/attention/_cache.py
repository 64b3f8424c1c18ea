"""What a layer keeps of the tokens before: written once, read by every token after them.

Row b of a cache of size S holds the tokens 0 to S - 1 of one sequence. What lies beyond the last
that was written is another document to attention, and is overwritten later.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparseformer_jax.attention.inputs import Inputs

Cache = dict[str, jax.Array]

_KEYS = ("key", "value")
_OF_QUERIES = frozenset({"x", "unrotated_query"})


def fields(needs: Iterable[str], *, gathers_keys: bool) -> tuple[str, ...]:
    """Returns which arrays of `Inputs` a method's cache holds.

    Keys and values, and what else the method reads of keys. One that does not gather keys needs
    as many queries, so those are kept too, with what it reads of them.
    """
    of_keys = (*_KEYS, *sorted(set(needs) - _OF_QUERIES))
    return of_keys if gathers_keys else (*of_keys, "query", *sorted(_OF_QUERIES & set(needs)))


def write(cache: Cache, inputs: Inputs, start: Int[Array, " B"]) -> Cache:
    """Returns the cache with T tokens more: row b's from position start[b] on."""

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        def row(kept: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=0)

        return jax.vmap(row)(kept, new.astype(kept.dtype), start)

    return {name: put(kept, getattr(inputs, name)) for name, kept in cache.items()}


def read(cache: Cache, inputs: Inputs, start: Int[Array, " B"]) -> Inputs:
    """Returns inputs of T queries, or of as many as keys, over all keys that the cache holds."""
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
