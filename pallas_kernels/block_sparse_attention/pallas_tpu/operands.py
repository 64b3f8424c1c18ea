"""Arrays in tiles, [batch, head, tile, rows, columns].

A block of a kernel is always the whole of the last two axes, so that every tile size is
legal. Nothing moves in memory where a tile has a multiple of 16 rows. The rows of a query
tile are those of one head, or of a group's heads one after the other: these have one list,
and neighbouring blocks of a selection have not.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.kernel_tables import Segments, Tiling


class Operand(NamedTuple):
    """An input, or the shape of an output, and the side of the walk that it lies on.

    Attributes:
        array: [B, heads, tiles, rows, columns], or without heads: [B, tiles, rows, columns].
        side: "rows" is fixed while a list is walked, "tiles" changes with each visit.
    """

    array: Any
    side: Literal["rows", "tiles"]


def operands(
    tiling: Tiling,
    rows_are: Literal["queries", "keys"],
    *,
    heads: int,
    queries: Sequence[Float[Array, "B T N H"]],
    keys: Sequence[Float[Array, "B S K H"]],
    statistics: Sequence[Float[Array, "B N T"]] = (),
    segments: Segments | None,
) -> list[Operand]:
    """Returns all arrays in tiles, in the order of the arguments.

    A number for each token, like the statistics of the queries, lies along the lanes.
    heads is how many query heads a tile of queries holds.
    """
    sides: tuple[Literal["rows", "tiles"], ...] = ("rows", "tiles")
    query_side, key_side = sides if rows_are == "queries" else sides[::-1]
    query_tile, key_tile = tiling.query_tile, tiling.key_tile
    ids = []
    if segments is not None:
        query_ids = _cut_vector(segments.query, query_tile)
        ids = [
            Operand(jnp.tile(query_ids, heads), query_side),
            Operand(_cut_vector(segments.key, key_tile), key_side),
        ]
    return [
        *(Operand(_cut(array, query_tile, heads), query_side) for array in queries),
        *(Operand(_cut(array, key_tile, 1), key_side) for array in keys),
        *(Operand(_cut_statistics(array, query_tile, heads), query_side) for array in statistics),
        *ids,
    ]


def joined(array: Float[Array, "B n M r H"], heads: int = 1) -> Float[Array, "B T N H"]:
    """Returns [batch, head, tile, ...] as the arrays outside are laid out."""
    batch, groups, tiles, rows, head_dim = array.shape
    array = array.reshape(batch, groups, tiles, heads, rows // heads, head_dim)
    return array.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, groups * heads, head_dim)


def joined_statistics(array: Float[Array, "B n M 1 r"], heads: int) -> Float[Array, "B N T"]:
    """Does as `joined` with a number for each query."""
    batch, groups, tiles, _, rows = array.shape
    array = array.reshape(batch, groups, tiles, heads, rows // heads).swapaxes(2, 3)
    return array.reshape(batch, groups * heads, -1)


def _cut(array: Float[Array, "B T N H"], tile: int, heads: int) -> Float[Array, "B n M r H"]:
    batch, _, all_heads, head_dim = array.shape
    groups = all_heads // heads
    array = array.reshape(batch, -1, tile, groups, heads, head_dim).transpose(0, 3, 1, 4, 2, 5)
    return array.reshape(batch, groups, -1, heads * tile, head_dim)


def _cut_statistics(
    array: Float[Array, "B N T"], tile: int, heads: int
) -> Float[Array, "B n M 1 r"]:
    batch, all_heads, _ = array.shape
    groups = all_heads // heads
    array = array.reshape(batch, groups, heads, -1, tile).swapaxes(2, 3)
    return array.reshape(batch, groups, -1, 1, heads * tile)


def _cut_vector(array: Shaped[Array, "*B T"], tile: int) -> Shaped[Array, "*B M 1 t"]:
    return array.reshape(*array.shape[:-1], -1, 1, tile)
