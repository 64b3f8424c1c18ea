"""Layout of the xla implementation: rows of query tiles, each with a list of key tiles.

Batch, heads, GQA groups and patterns per head all disappear here. One *program* is one
key/value head of one batch entry. Its query tiles become rows; query heads of a group
that share a pattern share a row too, and so read each key tile once. The key tiles of
all programs are numbered in one range: a list entry says everything about where to
read.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.tiles import Geometry

# [B, M, P, K, E, F] to [M, E, B, K, F, P], see Layout. The query block comes first, so
# that rows computed together have lists of like length; then any B K neighbours belong
# to different programs, which never write to the same key tile.
_ROW_ORDER = (1, 4, 0, 3, 5, 2)


class Lists(NamedTuple):
    """What each row attends to, for R rows and lists of capacity C.

    Attributes:
        counts: active key tiles of the row.
        tiles: their numbers among the key tiles of all programs.
        start: position of the row's first query.
        head: pattern head of the row.
        blocks: which of a program's J key tiles are for which of the F query blocks that share a
            tile, see `short_blocks`; None: each has a tile of its own.
    """

    counts: Int[Array, "R"]
    tiles: Int[Array, "R C"]
    start: Int[Array, "R"]
    head: Int[Array, "R"]
    blocks: Bool[Array, "R J F"] | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes: R = M E B K rows of Q = F P queries; U = B K J key tiles.

    Attributes:
        batch: B.
        kv_heads: K.
        patterns: E, patterns in a group: G when every query head has its own, else 1.
        folded: F = G / E, query heads that share a row.
        geometry: lengths and tile sizes.
    """

    batch: int
    kv_heads: int
    patterns: int
    folded: int
    geometry: Geometry

    @classmethod
    def of(
        cls,
        query: Shaped[Array, "B T N H"],
        key: Shaped[Array, "B S K H"],
        block_mask: BlockMask,
    ) -> "Layout":
        """Returns the layout for these arrays."""
        batch, _, kv_heads, _ = key.shape
        group = query.shape[2] // kv_heads
        patterns = max(1, block_mask.kv_counts.shape[-2] // kv_heads)
        folded = group // patterns
        return cls(batch, kv_heads, patterns, folded, block_mask.geometry)

    @property
    def programs(self) -> int:
        """B K."""
        return self.batch * self.kv_heads

    @property
    def query_heads(self) -> int:
        """N = K E F."""
        return self.kv_heads * self.patterns * self.folded

    def query_rows(self, array: Shaped[Array, "B T N *D"]) -> Shaped[Array, "R Q *D"]:
        """Cuts queries, or anything that has one entry per query, into rows."""
        blocks, size = self.geometry.query_blocks, self.geometry.query_block_size
        array = _pad(array, blocks * size)
        heads = (self.kv_heads, self.patterns, self.folded)
        array = array.reshape(self.batch, blocks, size, *heads, *array.shape[3:])
        array = jnp.moveaxis(array, _ROW_ORDER, range(6))
        return array.reshape(-1, self.folded * size, *array.shape[6:])

    def from_query_rows(self, rows: Shaped[Array, "R Q *D"]) -> Shaped[Array, "B T N *D"]:
        """Undoes `query_rows`."""
        blocks, size = self.geometry.query_blocks, self.geometry.query_block_size
        programs = (self.patterns, self.batch, self.kv_heads)
        array = rows.reshape(blocks, *programs, self.folded, size, *rows.shape[2:])
        array = jnp.moveaxis(array, range(6), _ROW_ORDER)
        length, heads = blocks * size, self.query_heads
        array = array.reshape(self.batch, length, heads, *rows.shape[2:])
        return array[:, : self.geometry.query_length]

    def key_tiles(self, array: Shaped[Array, "B S K *D"]) -> Shaped[Array, "U P *D"]:
        """Cuts keys, or anything that has one entry per key, into tiles."""
        blocks, size = self.geometry.key_blocks, self.geometry.key_block_size
        array = _pad(array, blocks * size)
        split = (self.batch, blocks, size, self.kv_heads, *array.shape[3:])
        array = jnp.moveaxis(array.reshape(split), 3, 1)
        return array.reshape(-1, size, *array.shape[4:])

    def query_segments(self, ids: Int[Array, "B T"]) -> Int[Array, "R Q"]:
        """Cuts segment ids like the queries they belong to."""
        every_head = (*ids.shape, self.query_heads)
        return self.query_rows(jnp.broadcast_to(ids[:, :, None], every_head))

    def key_segments(self, ids: Int[Array, "B S"]) -> Int[Array, "U P"]:
        """Cuts segment ids like the keys they belong to."""
        every_head = (*ids.shape, self.kv_heads)
        return self.key_tiles(jnp.broadcast_to(ids[:, :, None], every_head))

    def lists(
        self, block_mask: BlockMask, shared: Bool[Array, "*B Hp M J F"] | None = None
    ) -> Lists:
        """Spreads the tables of the mask over rows, and what `Lists.blocks` says of it."""
        counts = jnp.asarray(block_mask.kv_counts)
        tiles = jnp.asarray(block_mask.kv_indices)
        if counts.ndim == 2:
            counts, tiles = counts[None], tiles[None]
            shared = shared if shared is None else shared[None]
        blocks, heads = self.geometry.query_blocks, counts.shape[1]
        start = jnp.arange(blocks) * self.geometry.query_block_size
        start = self._per_row((start + block_mask.query_offset)[None, None])
        head = jnp.asarray(block_mask.head_numbers).reshape(-1, heads, 1)
        head = jnp.broadcast_to(head, (len(head), heads, blocks))
        program = jnp.arange(len(start)) % self.programs
        tiles = self._per_row(tiles) + program[:, None] * self.geometry.key_blocks
        shared = shared if shared is None else self._per_row(shared)
        return Lists(self._per_row(counts), tiles, start, self._per_row(head), shared)

    def _per_row(self, table: Shaped[Array, "b Hp M *C"]) -> Shaped[Array, "R *C"]:
        """Repeats a table for batch and heads that share it, in the order of rows."""
        batch, heads, blocks, *rest = table.shape
        table = table.reshape(batch, min(heads, self.kv_heads), -1, blocks, *rest)
        full = (self.batch, self.kv_heads, self.patterns, blocks, *rest)
        table = jnp.moveaxis(jnp.broadcast_to(table, full), (3, 2, 0, 1), range(4))
        return table.reshape(-1, *rest)


def _pad(array: Shaped[Array, "B T ..."], length: int) -> Shaped[Array, "B L ..."]:
    widths = [(0, 0)] * array.ndim
    widths[1] = (0, length - array.shape[1])
    return jnp.pad(array, widths)
