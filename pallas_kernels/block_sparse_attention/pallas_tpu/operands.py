"""Arrays in tiles, [batch, head, tile, rows, columns].

A block of a kernel is always the whole of the last two axes, so that every tile size is
legal. Nothing moves in memory where a tile has a multiple of 16 rows.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

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
    queries: Sequence[Float[Array, "B T N H"]],
    keys: Sequence[Float[Array, "B S K H"]],
    statistics: Sequence[Float[Array, "B N T"]] = (),
    segments: Segments | None,
) -> list[Operand]:
    """Returns all arrays in tiles, in the order of the arguments.

    A number for each token, like the statistics of the queries, lies along the lanes.
    """
    sides: tuple[Literal["rows", "tiles"], ...] = ("rows", "tiles")
    query_side, key_side = sides if rows_are == "queries" else sides[::-1]
    query_tile, key_tile = tiling.query_tile, tiling.key_tile
    ids = []
    if segments is not None:
        ids = [
            Operand(_cut_vector(segments.query, query_tile), query_side),
            Operand(_cut_vector(segments.key, key_tile), key_side),
        ]
    return [
        *(Operand(_cut(array, query_tile), query_side) for array in queries),
        *(Operand(_cut(array, key_tile), key_side) for array in keys),
        *(Operand(_cut_vector(array, query_tile), query_side) for array in statistics),
        *ids,
    ]


def joined(array: Float[Array, "B N M t H"]) -> Float[Array, "B T N H"]:
    """Returns [batch, head, tile, ...] as the arrays outside are laid out."""
    batch, heads, _, _, head_dim = array.shape
    return array.reshape(batch, heads, -1, head_dim).swapaxes(1, 2)


def _cut(array: Float[Array, "B T N H"], tile: int) -> Float[Array, "B N M t H"]:
    batch, _, heads, head_dim = array.shape
    return array.swapaxes(1, 2).reshape(batch, heads, -1, tile, head_dim)


def _cut_vector(array: Shaped[Array, "*B T"], tile: int) -> Shaped[Array, "*B M 1 t"]:
    return array.reshape(*array.shape[:-1], -1, 1, tile)
