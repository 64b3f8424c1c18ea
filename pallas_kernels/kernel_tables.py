"""The lists of a BlockMask, cut anew for the tiles of a kernel.

A kernel wants tiles that suit the hardware, a mask has the blocks of its method. Both
are cut into granules, their greatest common divisor. A list entry of a kernel carries
one bit per granule pair of its tile, so that any selection of blocks is exact in tiles
of any size. Segments fold in here too: tiles whose segments cannot meet are not listed.
"""

import dataclasses
import functools
import math
import operator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels import tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.rules import Dense

_Table = Int[np.ndarray, "..."] | Int[Array, "..."]

FULL = 0
_WORD = 32


class Lists(NamedTuple):
    """What each tile of one side meets on the other, b = 1 or B, Hp = 1, K or N.

    Attributes:
        counts: [b, Hp, M], entries of the list.
        tiles: [b, Hp, M, C], tile numbers, ascending; past the count they repeat the
            last valid one.
        bits: [b, Hp, M, C] int32, `FULL` when every pair of the tile is visible. Else
            bit (i * n + j) says that granule i of the queries may see granule j of the
            keys, with n the granules of a key tile: `Tiling.key_granules`.
    """

    counts: _Table
    tiles: _Table
    bits: _Table


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tile sizes of a kernel in tokens, and the granules that its bits speak of."""

    query_tile: int
    key_tile: int
    query_granule: int
    key_granule: int

    @classmethod
    def of(cls, block_mask: BlockMask, query_tile: int, key_tile: int) -> "Tiling":
        """Returns the tiling of a mask; see `refusal` for those that exist."""
        geometry = block_mask.geometry
        query_granule = math.gcd(query_tile, geometry.query_block_size)
        key_granule = math.gcd(key_tile, geometry.key_block_size)
        # A block that holds everything follows tiles of any size.
        query_granule = query_tile if geometry.query_blocks == 1 else query_granule
        key_granule = key_tile if geometry.key_blocks == 1 else key_granule
        return cls(query_tile, key_tile, query_granule, key_granule)

    @property
    def query_granules(self) -> int:
        """Granules in a query tile."""
        return self.query_tile // self.query_granule

    @property
    def key_granules(self) -> int:
        """Granules in a key tile."""
        return self.key_tile // self.key_granule


def refusal(block_mask: BlockMask, query_tile: int, key_tile: int) -> str | None:
    """Returns why a kernel with these tiles cannot take the mask; None when it can."""
    if block_mask.inner_rule is not None:
        return (
            f"the rule of block_mask has blocks of {block_mask.inner_rule.block_size} that its "
            f"{block_mask.query_block_size} x {block_mask.key_block_size} tiles do not follow: "
            "leave out the tile sizes, and let query_offset be a multiple of the blocks"
        )
    tiling = Tiling.of(block_mask, query_tile, key_tile)
    if tiling.query_granules * tiling.key_granules > _WORD:
        return (
            f"blocks of {block_mask.query_block_size} x {block_mask.key_block_size} tokens "
            f"need more than {_WORD} bits in tiles of {query_tile} x {key_tile}"
        )
    return None


def key_lists(block_mask: BlockMask, tiling: Tiling, segments: "Segments | None") -> Lists:
    """Returns the key tiles that each query tile meets."""
    bits, listed = _tile_bits(block_mask, tiling, segments)
    spread = _most_met(block_mask.key_block_size, tiling.key_tile)
    merged = _most_met(tiling.query_tile, block_mask.query_block_size)
    return _compact(bits, listed, block_mask.kv_indices.shape[-1] * spread * merged)


def query_lists(block_mask: BlockMask, tiling: Tiling, segments: "Segments | None") -> Lists:
    """Returns the query tiles that each key tile meets."""
    bits, listed = (x.swapaxes(-1, -2) for x in _tile_bits(block_mask, tiling, segments))
    spread = _most_met(block_mask.query_block_size, tiling.query_tile)
    merged = _most_met(tiling.key_tile, block_mask.key_block_size)
    return _compact(bits, listed, block_mask.q_indices.shape[-1] * spread * merged)


class Segments(NamedTuple):
    """Segment ids of queries [B, T] and of keys: [B, S], or [B, K, S] if their heads differ.

    In the latter case a mask has one pattern head, or K.
    """

    query: Int[Array, "B T"]
    key: Int[Array, "B *K S"]


def _most_met(size: int, other: int) -> int:
    """Returns how many tiles of one axis, cut into other, a tile of size can touch."""
    return (other - math.gcd(size, other) + size - 1) // other + 1


def _compact(bits: _Table, listed: tiles.Mask, most: int) -> Lists:
    counts, indices, _ = tiles.compact(listed.astype(np.int32), most)
    xp = tiles.namespace(indices)
    return Lists(counts, indices, xp.take_along_axis(bits, indices, axis=-1))


def _tile_bits(
    block_mask: BlockMask, tiling: Tiling, segments: Segments | None
) -> tuple[_Table, tiles.Mask]:
    """Returns (bits, listed), [b, Hp, M, J] each."""
    geometry = dataclasses.replace(
        block_mask.geometry,
        query_block_size=tiling.query_tile,
        key_block_size=tiling.key_tile,
    )
    granules = _granule_map(block_mask, tiling, geometry)
    weights = np.uint32(1) << np.arange(
        tiling.query_granules * tiling.key_granules, dtype=np.uint32
    )
    weights = weights.reshape(tiling.query_granules, tiling.key_granules).T
    xp = tiles.namespace(granules)
    # One at a time: together they would be as many words as there are granules.
    bits = functools.reduce(
        operator.or_,
        (
            xp.where(granules[place], weights[place].view(np.int32), np.int32(0))
            for place in np.ndindex(weights.shape)
        ),
    )
    offset = block_mask.query_offset
    offset = offset if xp is np else jnp.asarray(offset)
    active, whole, _ = tiles.rule_tiles(Dense(), geometry, offset)
    is_full = (bits == weights.sum(dtype=np.uint32).view(np.int32)) & whole
    listed = (bits != 0) & active
    if segments is not None:
        may_meet, are_one = segment_tiles(segments, tiling)
        listed, is_full = listed & may_meet, is_full & are_one
    xp = tiles.namespace(is_full)
    return xp.where(is_full, np.int32(FULL), bits), listed


def _granule_map(block_mask: BlockMask, tiling: Tiling, geometry: tiles.Geometry) -> tiles.Mask:
    """Returns [key_granules, query_granules, b, Hp, M, J], True where attended.

    The granules of a tile come first: short axes at the end are padded to many lanes.
    """
    blocks = block_mask.block_map()
    blocks = blocks if blocks.ndim == 4 else blocks[None]
    xp = tiles.namespace(blocks)
    query = np.arange(geometry.query_blocks * tiling.query_granules) * tiling.query_granule
    key = np.arange(geometry.key_blocks * tiling.key_granules) * tiling.key_granule
    # Vectors, combined by xp: traced programs hold no constants of the size of a map.
    inside = xp.asarray(query < block_mask.query_length)[:, None]
    inside = inside & xp.asarray(key < block_mask.key_length)
    query = (query // block_mask.query_block_size).clip(max=blocks.shape[-2] - 1)
    key = (key // block_mask.key_block_size).clip(max=blocks.shape[-1] - 1)
    fine = xp.take(xp.take(blocks, query, axis=-2), key, axis=-1) & inside
    rows = fine.reshape(*blocks.shape[:2], geometry.query_blocks, tiling.query_granules, -1)
    rows = xp.moveaxis(rows, 3, 0)
    pairs = rows.reshape(*rows.shape[:-1], geometry.key_blocks, tiling.key_granules)
    return xp.moveaxis(pairs, -1, 0)


def segment_tiles(
    segments: Segments, tiling: Tiling
) -> tuple[Bool[Array, "B K M J"], Bool[Array, "B K M J"]]:
    """Returns which tiles may share a segment, and which are of one and the same."""
    query_low, query_high = _extremes(segments.query, tiling.query_tile)
    query_low, query_high = query_low[:, None, :, None], query_high[:, None, :, None]
    key_low, key_high = (
        ids.reshape(len(ids), -1, 1, ids.shape[-1])
        for ids in _extremes(segments.key, tiling.key_tile)
    )
    may_meet = (query_low <= key_high) & (key_low <= query_high)
    return may_meet, (query_low == key_high) & (key_low == query_high)


def _extremes(ids: Int[Array, "*B T"], tile: int) -> tuple[Int[Array, "*B M"], Int[Array, "*B M"]]:
    """Returns the least and the largest id of each tile; the last may be ragged."""
    widths = [(0, 0)] * (ids.ndim - 1) + [(0, -ids.shape[-1] % tile)]
    ids = jnp.pad(ids, widths, mode="edge")
    ids = ids.reshape(*ids.shape[:-1], -1, tile)
    return ids.min(-1), ids.max(-1)
