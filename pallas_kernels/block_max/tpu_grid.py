"""The grid of the TPU kernel: which tiles a step reads, and what is visible in them."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from pallas_kernels.block_max.axis import Axis, power_of_two, visible_tiles
from pallas_kernels.block_max.call import Call
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.geometry import Geometry, Mask

LANES, SUBLANES = 128, 8
_KEY_TILE, _QUERY_TILE = 512, 1024
# Key blocks up to this size share a tile, eight of them or more.
_LARGEST_SHARING = 128
# Scores of one tile, 2 MiB in float32: they and their masked copy leave VMEM to spare.
_MOST_SCORES = 2**19

Ref = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static."""

    geometry: Geometry
    queries: Axis
    keys: Axis
    scores: Scores
    group: int
    over_group: bool

    @classmethod
    def of(cls, call: Call) -> "Plan":
        """Returns the plan of a call, with the largest tiles that suit the hardware."""
        geometry = call.geometry
        padded = max(SUBLANES, power_of_two(geometry.key_block_size))
        # Rows of maxima can be written eight or more at a time, or one at a time.
        tile = max(_KEY_TILE, SUBLANES * padded)
        tile = tile if padded <= _LARGEST_SHARING else min(padded, _KEY_TILE)
        keys = Axis(geometry.key_length, geometry.key_block_size, padded, tile)
        size = geometry.query_block_size
        padded = 1 if size == 1 else max(SUBLANES, power_of_two(size))
        rows = max(LANES, power_of_two(geometry.query_blocks * padded))
        tile = min(rows, _QUERY_TILE, _MOST_SCORES // tile)
        queries = Axis(geometry.query_length, size, padded, tile)
        return cls(geometry, queries, keys, call.scores, call.group, call.over_group)

    @property
    def parts(self) -> int:
        """What an output block is the maximum of: heads of a group, tiles of a block."""
        return self.queries.tiles_in_block * (self.group if self.over_group else 1)

    @property
    def steps(self) -> int:
        """Key tiles behind the key blocks of an output block."""
        tiles = LANES * self.keys.tiles_in_block // self.keys.blocks_in_tile
        return min(self.keys.tiles, tiles)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Output blocks in a head, parts and steps."""
        rows = self.queries.tiles // self.queries.tiles_in_block
        return rows, -(-self.keys.blocks // LANES), self.parts, self.steps


class Facts(NamedTuple):
    """Scalars in SMEM: [1], and the extremes of segments in each tile, [B, tiles]."""

    offset: Ref
    query_low: Ref = None
    query_high: Ref = None
    key_low: Ref = None
    key_high: Ref = None


class Place(NamedTuple):
    """Where a step of the grid stands: numbers of heads and tiles."""

    batch: Array
    query_head: Array
    key_head: Array
    query_tile: Array
    key_tile: Array
    start: Array
    stop: Array
    positions: tuple[Array, Array]

    @classmethod
    def of(cls, plan: Plan, facts: Facts, *grid: Array) -> "Place":
        """Returns the place; key tiles that its queries see go from start to stop."""
        batch, head, row, group, part, step = grid
        tiles = np.int32(plan.queries.tiles_in_block)
        if plan.over_group:
            query_head, key_head = head * plan.group + lax.div(part, tiles), head
        else:
            query_head, key_head = head, lax.div(head, np.int32(plan.group))
        query_tile = row * tiles + lax.rem(part, tiles)
        first = query_tile * plan.queries.tile
        last = first + plan.queries.tile - 1
        positions = tuple(facts.offset[0] + plan.queries.token(i) for i in (first, last))
        bounds = visible_tiles(plan.geometry, plan.keys, *positions)
        key_tile = group * plan.steps + step
        return cls(batch, query_head, key_head, query_tile, key_tile, *bounds, positions)

    @property
    def nearest_key_tile(self) -> Array:
        """One that is seen: what is never read need not be fetched."""
        return jnp.clip(self.key_tile, self.start, jnp.maximum(self.start, self.stop - 1))

    def is_visible(self, facts: Facts) -> Bool[Array, ""]:
        """Returns whether some pair of the tile may be visible."""
        listed = (self.start <= self.key_tile) & (self.key_tile < self.stop)
        if facts.query_low is None:
            return listed
        query, key = (self.batch, self.query_tile), (self.batch, self.nearest_key_tile)
        meet = facts.query_low[query] <= facts.key_high[key]
        return listed & meet & (facts.key_low[key] <= facts.query_high[query])

    def is_full(self, plan: Plan, facts: Facts) -> Mask:
        """Returns whether all pairs of the tile are visible."""
        first = self.key_tile * plan.keys.tile
        ends = (plan.keys.token(i) for i in (first, first + plan.keys.tile - 1))
        _, inside = plan.geometry.spans(*self.positions, *ends)
        if facts.query_low is None:
            return inside
        query, key = (self.batch, self.query_tile), (self.batch, self.nearest_key_tile)
        are_one = facts.query_low[query] == facts.key_high[key]
        return inside & are_one & (facts.key_low[key] == facts.query_high[query])
