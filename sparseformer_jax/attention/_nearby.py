"""Attention to the blocks around a query's own, with embeddings of relative positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseformer_jax.attention import _tiles
from sparseformer_jax.attention.inputs import SegmentIds


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    size: int,
    blocks: int,
    *,
    is_causal: bool,
    query_offset: Any = 0,
    segment_ids: SegmentIds | None = None,
    **scores: Any,
) -> Float[Array, "B T N H"]:
    """Returns attention of each query to its own block and those next to it.

    Args:
      query: queries from an offset on.
      key: keys of the whole sequence.
      value: values of the whole sequence.
      size: P, tokens in a block.
      blocks: that a query sees looking back, its own counted; as many ahead if not causal.
      is_causal: no key behind the query's position is seen.
      query_offset: position of the first query.
      segment_ids: keys of another segment are not seen.
      **scores: what `_tiles.attend` takes of scale, cap and relative embeddings.
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    back, ahead = blocks - 1, 0 if is_causal else blocks - 1
    # The blocks of the queries alone: as many as touch them, wherever they start.
    num_blocks, first = -(-num_keys // size), 0
    if num_queries < num_keys:
        num_blocks = min(num_blocks, (num_queries + 2 * (size - 1)) // size)
        first = query_offset // size
    start = query_offset - first * size

    def of_queries(x: jax.Array) -> jax.Array:
        """Cuts queries into blocks [B, .., M, P, ..]."""
        whole = jnp.zeros((x.shape[0], num_blocks * size, *x.shape[2:]), x.dtype)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, x, start, axis=1)
        return whole.reshape(x.shape[0], num_blocks, size, *x.shape[2:])

    def of_keys(x: jax.Array) -> jax.Array:
        """Gives each of those blocks the keys around it, [B, M, W, ..]."""
        padding = [(0, 0)] * x.ndim
        padding[1] = (back * size, (num_blocks + ahead) * size)
        length = (back + num_blocks + ahead) * size
        x = jax.lax.dynamic_slice_in_dim(jnp.pad(x, padding), first * size, length, axis=1)
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        shifted = [x[:, j : j + num_blocks] for j in range(back + 1 + ahead)]
        return jnp.concatenate(shifted, axis=2)

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 3, 1)

    place = np.arange(-back * size, (ahead + 1) * size) - np.arange(size)[:, None]
    block = jnp.arange(num_blocks)[:, None, None] + first
    position = block * size + np.arange(-back * size, (ahead + 1) * size)
    visible = (position >= 0) & (position < num_keys)  # [M, 1, W]
    if is_causal:
        visible &= place <= 0
    if segment_ids is not None:
        of_query, of_key = of_queries(segment_ids[0]), of_keys(segment_ids[1])
        visible = visible & (of_query[..., None] == of_key[..., None, :])[:, None]
    out = _tiles.attend(
        heads_first(of_queries(query)),
        heads_first(of_keys(key)),
        heads_first(of_keys(value)),
        visible,
        first_place=-back * size,
        **scores,
    )
    out = jnp.moveaxis(out, 1, 3).reshape(query.shape[0], -1, *query.shape[2:])
    return jax.lax.dynamic_slice_in_dim(out, start, num_queries, axis=1)
