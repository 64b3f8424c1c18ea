"""What the Triton kernel of block maxima knows at compile time."""

import dataclasses

from pallas_kernels.block_max.axis import Axis
from pallas_kernels.block_sparse_attention.triton.spec import ProductSpec
from pallas_kernels.geometry import Geometry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(ProductSpec):
    """Axes, limits and scores.

    Attributes:
        geometry: limits on pairs.
        query_axis: tokens, blocks and tiles of the queries.
        key_axis: those of the keys.
        heads: N.
        kv_heads: K.
        over_group: the maximum is over the query heads of a key head, too.
        has_segments: segment ids are given.
    """

    geometry: Geometry
    query_axis: Axis
    key_axis: Axis
    heads: int
    kv_heads: int
    over_group: bool
    has_segments: bool

    @property
    def queries(self) -> int:
        """T, padded."""
        return self.query_axis.tiles * self.query_axis.tile

    @property
    def keys(self) -> int:
        """S, padded."""
        return self.key_axis.tiles * self.key_axis.tile

    @property
    def query_tile(self) -> int:
        """Tokens in a query tile."""
        return self.query_axis.tile

    @property
    def key_tile(self) -> int:
        """Tokens in a key tile."""
        return self.key_axis.tile

    @property
    def query_pieces(self) -> int:
        """Query tiles in a block, if it is larger than one."""
        return self.query_axis.tiles_in_block

    @property
    def key_pieces(self) -> int:
        """Key tiles in a block, if it is larger than one."""
        return self.key_axis.tiles_in_block

    @property
    def rows(self) -> int:
        """Query blocks of a program."""
        return self.query_axis.blocks_in_tile

    @property
    def columns_in_tile(self) -> int:
        """Key blocks in a tile."""
        return self.key_axis.blocks_in_tile

    @property
    def queries_in_row(self) -> int:
        """Queries of a tile in one block."""
        return self.query_tile // self.rows

    @property
    def keys_in_column(self) -> int:
        """Keys of a tile in one block."""
        return self.key_tile // self.columns_in_tile

    @property
    def columns(self) -> int:
        """Key blocks that the tiles hold."""
        return self.key_axis.slots

    @property
    def heads_per_row(self) -> int:
        """Query heads behind a head of the result."""
        return self.heads // self.kv_heads if self.over_group else 1

    @property
    def row_heads(self) -> int:
        """Heads of the result."""
        return self.heads // self.heads_per_row

    @property
    def row_programs(self) -> int:
        """Programs of a head of the result."""
        return self.query_axis.slots // self.rows

    @property
    def heads_per_key(self) -> int:
        """Heads of the result that read a key head."""
        return self.row_heads // self.kv_heads

    @property
    def parts(self) -> int:
        """What a number of the result is the maximum of: heads, tiles of a block."""
        return self.heads_per_row * self.query_pieces

    @property
    def least(self) -> int:
        """Smallest i - j of a visible pair outside the prefix."""
        return self.geometry.reach[0]

    @property
    def most(self) -> int:
        """Largest i - j of a visible pair."""
        return self.geometry.reach[1]

    @property
    def prefix_length(self) -> int:
        """Keys that causality does not hide."""
        return self.geometry.prefix_length

    @property
    def prefix_least(self) -> int:
        """Smallest i - j of a visible pair in the prefix."""
        return self.geometry.prefix_least
