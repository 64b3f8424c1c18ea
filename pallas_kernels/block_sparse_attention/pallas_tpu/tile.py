"""What the kernels compute on one tile: products, masks, and statistics in lanes."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from pallas_kernels import precision
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.pallas_tpu.walk import Here, divided
from pallas_kernels.kernel_tables import Tiling

LANES = 128
# Logits of masked pairs, and the least maximum of a row: exp(MASKED - LEAST) is 0, so
# a row that has seen nothing yet keeps a sum of 0.
MASKED = -2.0e38
LEAST = -1.0e30


def product(
    left: Float[Array, "m c"], right: Float[Array, "..."], *, transposed: bool = False
) -> Float[Array, "m n"]:
    """Returns left @ right, or left @ right', in float32 and exact for float32."""
    contracted = 1 if transposed else 0
    return lax.dot_general(
        left,
        right,
        (((1,), (contracted,)), ((), ())),
        precision=precision.exact(left.dtype),
        preferred_element_type=jnp.float32,
    )


def visible(
    plan: Plan,
    tiling: Tiling,
    here: Here,
    segments: tuple[Shaped[Array, "..."], Shaped[Array, "..."]] | None,
    *,
    keys_first: bool,
) -> Bool[Array, "m n"]:
    """Returns which pairs of a tile are visible: [queries, keys], or [keys, queries].

    segments are ids of the queries and of the keys, in shapes that broadcast.
    """
    sizes = (plan.options.heads * tiling.query_tile, tiling.key_tile)
    axes = (1, 0) if keys_first else (0, 1)
    shape = tuple(sizes[axis] for axis in axes)
    row, key = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in axes)
    # The heads of a tile have the same queries.
    query = row - divided(row, tiling.query_tile) * tiling.query_tile
    query_tile, key_tile = (here.tile, here.row) if keys_first else (here.row, here.tile)
    position = query_tile * tiling.query_tile + query + here.query_offset
    key_position = key_tile * tiling.key_tile + key
    geometry = plan.geometry
    mask: Any = geometry.pairs(position, key_position)
    if tiling.query_granules * tiling.key_granules > 1:
        granule = divided(query, tiling.query_granule) * tiling.key_granules
        granule += divided(key, tiling.key_granule)
        mask &= lax.shift_right_logical(here.bits, granule) & 1 == 1
    if geometry.key_length % tiling.key_tile:
        mask &= key_position < geometry.key_length
    if segments is not None:
        mask &= segments[0] == segments[1]
    return mask


def across(column: Float[Array, "m lanes"], width: int) -> Float[Array, "m width"]:
    """Returns a number for each row, equal in all lanes, in `width` lanes."""
    repeats = -(-width // LANES)
    return (column if repeats == 1 else jnp.tile(column, (1, repeats)))[:, :width]


def as_column(row: Shaped[Array, "1 m"]) -> Shaped[Array, "m lanes"]:
    """Returns a number for each lane as one for each row, equal in all lanes."""
    return jnp.broadcast_to(row.reshape(-1, 1), (row.shape[1], LANES))


def as_row(column: Float[Array, "m lanes"]) -> Float[Array, "1 m"]:
    """Undoes `as_column`."""
    return column.T[:1]
