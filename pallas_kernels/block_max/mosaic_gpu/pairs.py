"""Which pairs of a query tile and a warpgroup's keys are visible."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_max.mosaic_gpu.plan import QUERY_TILE, Plan
from pallas_kernels.block_sparse_attention.mosaic_gpu.masks import TileMask
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import (
    Warpgroup,
    along_columns,
    along_rows,
)
from pallas_kernels.kernel_tables import Segments, Tiling

_Number = Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The keys of a warpgroup, and what queries see of them.

    Attributes:
        plan: the static facts.
        warpgroup: whose they are.
        start: the index of the first key in the padded sequence.
        query_offset: the position of query 0.
        segments: references to those of all queries [T] and keys [S], if given.
    """

    plan: Plan
    warpgroup: Warpgroup
    start: _Number
    query_offset: _Number
    segments: Segments | None

    def hide(
        self, raw: Float[Array, "64 C"], tile: _Number, is_full: Bool[Array, ""]
    ) -> Float[Array, "64 C"]:
        """Returns products with a query tile, -inf where a pair is not visible."""
        return lax.cond(
            is_full,
            lambda raw: raw,
            lambda raw: jnp.where(self._visible(tile), raw, -jnp.inf),
            raw,
        )

    def _visible(self, tile: _Number) -> Bool[Array, "64 C"]:
        plan, first, width = self.plan, tile * QUERY_TILE, self.plan.part
        query = plan.queries.token(first + self.warpgroup.row_numbers())
        key = plan.keys.token(self.start + self.warpgroup.column_numbers(width))
        tiling = Tiling(QUERY_TILE, width, QUERY_TILE, width)
        limits = TileMask(plan.geometry, tiling, rows_are_queries=True)
        visible = limits.within(query + self.query_offset, key, jnp.int32(0))
        if self.segments is None:
            return visible
        own = self.warpgroup.load_rows(self.segments.query.at[pl.ds(first, QUERY_TILE)])
        other = self.warpgroup.load_columns(self.segments.key.at[pl.ds(self.start, width)])
        return visible & (along_rows(own, width) == along_columns(other, QUERY_TILE))
