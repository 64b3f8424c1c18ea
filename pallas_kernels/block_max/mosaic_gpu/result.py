"""The part of the result that a warpgroup writes: its columns, in all rows."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_max.mosaic_gpu.path import Path
from pallas_kernels.block_max.mosaic_gpu.plan import QUERY_TILE, Plan
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import Warpgroup

_Number = Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Result:
    """Columns of the result of a head.

    Attributes:
        plan: the static facts.
        warpgroup: whose they are.
        ref: reference to all rows and columns.
        column: the first one of its own.
        exchange: reference to shared memory where its warps meet, [columns, `QUERY_TILE`].
    """

    plan: Plan
    warpgroup: Warpgroup
    ref: Any
    column: _Number
    exchange: Any

    def clear(self, path: Path) -> None:
        """Writes 0 to the rows that are not on a path; to be called before `store`.

        It writes whole tiles of rows, and with them some that are on the path.
        """
        first, last = (row * self.plan.rows for row in path.rows)

        def clear(number: _Number, _: None) -> None:
            zeros = self.warpgroup.rows_of(0.0)
            self._write(number * QUERY_TILE, [zeros] * self.plan.columns)

        size = jnp.int32(QUERY_TILE)
        lax.fori_loop(0, lax.div(first + (QUERY_TILE - 1), size), clear, None)
        lax.fori_loop(lax.div(last, size), self.ref.shape[0] // QUERY_TILE, clear, None)

    def store(self, row: _Number, best: tuple[Float[Array, "64"], ...]) -> None:
        """Writes the maxima of a row of the path, from those of each query for each column."""
        first = row * self.plan.rows
        if self.plan.rows == QUERY_TILE:
            self._write(first, best)
            return
        # Each warp has queries of its own. The first barrier is for what was read here for the
        # row before, and for what `clear` wrote.
        plgpu.commit_smem()
        for column, maxima in enumerate(best):
            self.exchange[column] = maxima
        plgpu.commit_smem()
        size = QUERY_TILE // self.plan.rows
        for column in range(len(best)):
            for block in range(self.plan.rows):
                queries = self.exchange.at[column, pl.ds(block * size, size)]
                maximum = self.warpgroup.load_columns(queries).max()
                self.ref[first + block, self.column + column] = maximum

    def _write(self, first: _Number, columns: Any) -> None:
        """Writes `QUERY_TILE` rows."""
        for column, values in enumerate(columns):
            self.ref[pl.ds(first, QUERY_TILE), self.column + column] = values
