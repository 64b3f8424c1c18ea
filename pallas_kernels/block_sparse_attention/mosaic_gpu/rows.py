"""The 64 rows that a warpgroup works on, and what they see of the tiles that pass by."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_sparse_attention.mosaic_gpu.kernels import Mask, entry_of_batch
from pallas_kernels.block_sparse_attention.mosaic_gpu.masks import TileMask
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import (
    ROWS,
    Warpgroup,
    along_columns,
    along_rows,
)
from pallas_kernels.kernel_tables import FULL

_Number = Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Consecutive rows of one side, queries or keys.

    Attributes:
        warpgroup: whose they are.
        tile_mask: the static facts of the mask.
        part: which 64 rows of their tile they are.
        start: the index of the first row in its array.
        query_offset: the position of query 0.
        segments: of the rows, if given.
        column_segments: reference to those of the other side [T] or [S], if given.
    """

    warpgroup: Warpgroup
    tile_mask: TileMask
    part: _Number
    start: _Number
    query_offset: _Number
    segments: Int[Array, "64"] | None
    column_segments: Any

    @staticmethod
    def of(
        warpgroup: Warpgroup,
        tile_mask: TileMask,
        mask: Mask,
        batch: _Number,
        tile: _Number,
        part: _Number,
    ) -> "Rows":
        """Returns the rows `part` of a tile."""
        tiling, by_query = tile_mask.tiling, tile_mask.rows_are_queries
        start = tile * (tiling.query_tile if by_query else tiling.key_tile) + part * ROWS
        segments = columns = None
        if mask.query_segments is not None:
            sides = (mask.query_segments, mask.key_segments)
            own, other = sides if by_query else sides[::-1]
            segments = warpgroup.load_rows(own.at[batch, pl.ds(start, ROWS)])
            columns = other.at[batch]
        offset = entry_of_batch(mask.query_offset, batch)
        return Rows(warpgroup, tile_mask, part, start, offset, segments, columns)

    def sees_some(self, bits: _Number, tile: _Number) -> Bool[Array, ""]:
        """Returns whether the rows may see any column of a tile; bits are its entry's."""
        first, base = self._position(self.start), self._base(tile)
        return self.tile_mask.sees_some(bits, self.part, first, base)

    def hide(self, array: Array, bits: _Number, tile: _Number, value: float) -> Array:
        """Returns [64, C] with value where a pair of the tile is not visible."""
        return lax.cond(
            bits == FULL,
            lambda array: array,
            lambda array: jnp.where(self._visible(bits, tile, array.shape[1]), array, value),
            array,
        )

    def _visible(self, bits: _Number, tile: _Number, width: int) -> Bool[Array, "64 C"]:
        rows = self.warpgroup.row_numbers()
        columns = self.warpgroup.column_numbers(width)
        visible = self.tile_mask.within(
            rows + self._position(self.start), columns, self._base(tile)
        )
        allowed = self.tile_mask.allows(bits, rows + self.part * ROWS, columns)
        visible = visible if allowed is None else visible & allowed
        if self.segments is None:
            return visible
        ids = self.column_segments.at[pl.ds(tile * width, width)]
        ids = self.warpgroup.load_columns(ids)
        return visible & (along_rows(self.segments, width) == along_columns(ids, ROWS))

    def _position(self, start: _Number) -> _Number:
        return start + self.query_offset if self.tile_mask.rows_are_queries else start

    def _base(self, tile: _Number) -> _Number:
        """Returns the position of a tile's first column."""
        tiling = self.tile_mask.tiling
        if self.tile_mask.rows_are_queries:
            return tile * tiling.key_tile
        return tile * tiling.query_tile + self.query_offset
