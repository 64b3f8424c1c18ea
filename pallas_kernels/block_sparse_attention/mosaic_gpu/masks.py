"""Which pairs of a partial tile are visible, for 64 rows of either side.

Everything here is plain arithmetic on what a warpgroup holds: numbers of its rows and
columns, and one word of bits per list entry. Rows are queries or keys; columns are the
other side, whose tiles are streamed.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import (
    ROWS,
    along_columns,
    along_rows,
)
from pallas_kernels.kernel_tables import FULL, Tiling
from pallas_kernels.tiles import Geometry

_Number = Int[Array, ""]
_Numbers = Int[Array, "..."]


@dataclasses.dataclass(frozen=True)
class TileMask:
    """The static facts of a mask.

    Attributes:
        geometry: lengths and limits.
        tiling: tiles and granules.
        rows_are_queries: else rows are keys.
    """

    geometry: Geometry
    tiling: Tiling
    rows_are_queries: bool

    def limits(self, positions: _Numbers) -> tuple[_Numbers | None, _Numbers]:
        """Returns first and last visible column position of each row position.

        None stands for a limit that there is not.
        """
        geometry = self.geometry
        least, most = geometry.reach
        has_window = geometry.window_size is not None
        if self.rows_are_queries:
            low = positions - most if has_window or geometry.is_anticausal else None
            high = positions - least
            if geometry.prefix_length:
                within = jnp.minimum(positions - geometry.prefix_least, geometry.prefix_length - 1)
                high = jnp.maximum(high, within)
            return low, jnp.minimum(high, geometry.key_length - 1)
        low = positions + least if has_window or geometry.is_causal else None
        if low is not None and geometry.prefix_length:
            is_prefix = positions < geometry.prefix_length
            low = jnp.where(is_prefix, positions + geometry.prefix_least, low)
        nothing = lax.full_like(positions, -(2**30))
        return low, jnp.where(positions < geometry.key_length, positions + most, nothing)

    def row_bits(self, rows: _Numbers) -> _Numbers:
        """Returns the number of the first bit of each row of the tile."""
        tiling = self.tiling
        if self.rows_are_queries:
            return _divided(rows, tiling.query_granule) * tiling.key_granules
        return _divided(rows, tiling.key_granule)

    def column_bits(self, columns: _Numbers) -> _Numbers:
        """Returns what each column adds to the bit number of its row."""
        tiling = self.tiling
        if self.rows_are_queries:
            return _divided(columns, tiling.key_granule)
        return _divided(columns, tiling.query_granule) * tiling.key_granules

    def allows(self, bits: _Number, rows: _Numbers, columns: _Numbers) -> Bool[Array, "R C"] | None:
        """Returns which pairs the bits show; None when one bit speaks for the tile."""
        tiling = self.tiling
        if tiling.query_granules * tiling.key_granules == 1:
            return None
        shape = (rows.shape[0], columns.shape[0])
        # A row shifts its bits down once, then a column tests one of them.
        word = lax.shift_right_logical(lax.broadcast(bits, rows.shape), self.row_bits(rows))
        one = lax.shift_left(lax.full_like(columns, 1), self.column_bits(columns))
        return (along_rows(word, shape[1]) & along_columns(one, shape[0])) != 0

    def within(self, positions: _Numbers, columns: _Numbers, base: _Number) -> Bool[Array, "R C"]:
        """Returns which pairs the limits allow, in the tile whose first column is base."""
        low, high = self.limits(positions)
        shape = (positions.shape[0], columns.shape[0])
        column = along_columns(columns, shape[0])
        mask = column <= along_rows(high - base, shape[1])
        return mask if low is None else mask & (column >= along_rows(low - base, shape[1]))

    def sees_some(
        self, bits: _Number, part: _Number, first: _Number, base: _Number
    ) -> Bool[Array, ""]:
        """Returns whether any row of a warpgroup sees a column of a tile.

        It may answer True where the exact masks show nothing.

        Args:
            bits: of the list entry.
            part: which 64 rows of the tile the warpgroup has.
            first: the position of its first row.
            base: the position of the tile's first column.
        """
        own = (first, first + (ROWS - 1))
        tiling = self.tiling
        if self.rows_are_queries:
            some, _ = self.geometry.spans(*own, base, base + (tiling.key_tile - 1))
        else:
            some, _ = self.geometry.spans(base, base + (tiling.query_tile - 1), *own)
        own_bits = lax.shift_left(jnp.int32(self._part_bits()), part * self._part_step())
        return (jnp.asarray(some) & ((bits & own_bits) != 0)) | (bits == FULL)

    def _part_step(self) -> int:
        """Returns how much higher the bits of the next 64 rows are."""
        if self.rows_are_queries:
            return ROWS // self.tiling.query_granule * self.tiling.key_granules
        return ROWS // self.tiling.key_granule

    def _part_bits(self) -> np.int32:
        """Returns the bits of the first 64 rows and all columns of a tile."""
        tiling = self.tiling
        shape = (tiling.query_granules, tiling.key_granules)
        order = np.arange(shape[0] * shape[1], dtype=np.uint32).reshape(shape)
        granule = tiling.query_granule if self.rows_are_queries else tiling.key_granule
        count = max(1, ROWS // granule)
        order = order[:count] if self.rows_are_queries else order[:, :count]
        return (np.uint32(1) << order).sum(dtype=np.uint32).view(np.int32)


def _divided(numbers: _Numbers, size: int) -> _Numbers:
    return lax.div(numbers, lax.full_like(numbers, size))
