"""What is static about the Hopper kernel of block maxima: tiles, and the depth of its ring."""

import dataclasses

from pallas_kernels.block_max.axis import Axis, power_of_two
from pallas_kernels.block_max.call import Call
from pallas_kernels.block_sparse_attention.mosaic_gpu import pieces, tuning
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.geometry import Geometry
from pallas_kernels.targets import Target

WARPGROUPS = 2
"""Warpgroups that compute."""
QUERY_TILE = 64
"""Queries that are streamed at once, the rows of a product."""

# The keys of a warpgroup: as many as WGMMA multiplies at once, where their share of shared
# memory leaves room for queries and the maxima of their blocks fit in registers.
_MOST_KEYS, _KEY_BYTES, _MOST_COLUMNS = 256, 64 * 1024, 16
# Warpgroups read and multiply columns by eights.
_SMALLEST_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of a call.

    Attributes:
        geometry: limits on pairs.
        queries: tokens and blocks of the queries, in tiles of `QUERY_TILE`.
        keys: those of the keys, in tiles of which every warpgroup has a part.
        scores: scale and soft cap.
        heads: query heads behind a head of the result.
        kv_group: heads of the result that read a key head.
        pieces: arrays of 16 bits whose sum an array is.
        row_bytes: of a token in a head.
        target: the machine.
    """

    geometry: Geometry
    queries: Axis
    keys: Axis
    scores: Scores
    heads: int
    kv_group: int
    pieces: int
    row_bytes: int
    target: Target

    @classmethod
    def of(cls, call: Call, target: Target) -> "Plan":
        """Returns the plan of a call."""
        geometry, count = call.geometry, pieces.count(call.query.dtype)
        row_bytes = tuning.BYTES * count * tuning.padded(call.query.shape[-1])
        key_block = _padded(geometry.key_block_size)
        fitting = power_of_two(_KEY_BYTES // row_bytes + 1) // 2
        key_tile = WARPGROUPS * min(_MOST_KEYS, fitting, _MOST_COLUMNS * key_block)
        query_block = geometry.query_block_size
        # Rows kept apart are written as they are.
        query_block = 1 if query_block == 1 else _padded(query_block)
        return cls(
            geometry=geometry,
            queries=Axis(geometry.query_length, geometry.query_block_size, query_block, QUERY_TILE),
            keys=Axis(geometry.key_length, geometry.key_block_size, key_block, key_tile),
            scores=call.scores,
            heads=call.group if call.over_group else 1,
            kv_group=1 if call.over_group else call.group,
            pieces=count,
            row_bytes=row_bytes,
            target=target,
        )

    @property
    def part(self) -> int:
        """Keys of a warpgroup."""
        return self.keys.tile // WARPGROUPS

    @property
    def width(self) -> int:
        """Keys behind a column of the kernel's result: a block, or what one part has of it."""
        return min(self.keys.padded, self.part)

    @property
    def columns(self) -> int:
        """Columns that a warpgroup writes."""
        return self.part // self.width

    @property
    def stages(self) -> int:
        """Query tiles in flight: those that fit beside the keys and the maxima of their blocks."""
        maxima = 4 * WARPGROUPS * self.columns * QUERY_TILE
        resident = self.keys.tile * self.row_bytes + maxima
        return tuning.stages(resident, QUERY_TILE * self.row_bytes)

    @property
    def rows(self) -> int:
        """Rows of the result that a query tile adds to."""
        return self.queries.blocks_in_tile


def _padded(block: int) -> int:
    return max(_SMALLEST_BLOCK, power_of_two(block))
