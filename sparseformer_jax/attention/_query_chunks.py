"""What is told of every query, some of them at a time: what is held of keys is of these alone."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sparseformer_jax.attention.inputs import Inputs, Shard

_Tree = TypeVar("_Tree")

_WIDTH = 1024  # queries at once


def mapped(
    function: Callable[..., _Tree],
    inputs: Inputs,
    shard: Shard,
    *others: Any,
    policy: Callable[..., bool] | None = None,
) -> _Tree:
    """Returns function(inputs, shard, *others), arrays [B, T, ..], made of chunks of queries.

    The backward pass makes a chunk anew.

    Args:
      function: of queries and of all keys.
      inputs: of all queries.
      shard: where they lie.
      others: arrays [B, T, ..] that are cut as queries are, or None.
      policy: of `jax.checkpoint`, what is kept for the backward pass; None: nothing.
    """
    length = inputs.query.shape[1]
    width = min(_WIDTH, length)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -length % width)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, width, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(len(x), -1, *x.shape[3:])[:, :length]

    def chunk(of_chunk: tuple[Any, ...]) -> _Tree:
        number, query, unrotated, positions, ids, others = of_chunk
        own = dataclasses.replace(
            inputs,
            query=query,
            unrotated_query=unrotated,
            positions=(positions, inputs.positions[1]),
            segment_ids=inputs.segment_ids and (ids, inputs.segment_ids[1]),
        )
        place = shard.query_offset + number * width
        return function(own, dataclasses.replace(shard, query_offset=place), *others)

    ids = inputs.segment_ids and inputs.segment_ids[0]
    arrays = (inputs.query, inputs.unrotated_query, inputs.positions[0], ids, others)
    chunks = jax.tree.map(cut, arrays)
    chunk = jax.checkpoint(chunk, policy=policy)
    found = jax.lax.map(chunk, (jnp.arange(-(-length // width)), *chunks))
    return jax.tree.map(joined, found)
