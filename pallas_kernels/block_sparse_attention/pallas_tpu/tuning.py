"""Tile sizes, and heads in a tile, that should take least time, by a count of the tiles.

No figure here was measured on a TPU. The constants follow published tunings of dense
attention there: tiles of 1024 x 1024 beat 512 x 512 on long sequences, 128 x 128 is
several times slower, and a step of the grid costs about 0.35 microseconds.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pallas_kernels import kernel_tables, tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.geometry import Geometry
from pallas_kernels.rules import Dense

# A step takes the time of this many pairs of a query and a key more than it has,
_OVERHEAD = 2**17
# and each side of its tile, added up in sums of that side, that of this many more tokens.
_ACCUMULATION = 128
_LARGEST = 1024
# Products of float32 take six passes, and its tiles twice the memory.
_LARGEST_WIDE = 512
# Rows of a tile fill registers of 16 rows in bfloat16; keys lie in 128 lanes.
_QUERY_UNIT, _KEY_UNIT = 16, 128
_ROW_UNIT = 8
SMALLEST = (_QUERY_UNIT, _KEY_UNIT)


@dataclasses.dataclass(frozen=True)
class Options:
    """What else the kernels are told: query heads with one list, side by side in a tile."""

    heads: int


class Choice(NamedTuple):
    """Tile sizes, heads in a query tile, an estimate of the time in pairs of a query and a key."""

    query_tile: int
    key_tile: int
    heads: int
    cost: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Tokens in a query and in a key tile."""
        return self.query_tile, self.key_tile


def choose(call: Call) -> Choice | None:
    """Returns the best of `choices`; None when no tiles can take the mask of a call."""
    return next(iter(choices(call)), None)


def choices(call: Call) -> list[Choice]:
    """Returns the tiles that can take the mask of a call, the best first.

    A mask whose lists are known on the host is counted. Of one whose lists are traced,
    blocks are expected to be listed at random, as many as there is room for.
    """
    block_mask = call.block_mask
    geometry = block_mask.geometry
    block = geometry.query_block_size
    largest = _LARGEST if call.query.dtype == jnp.bfloat16 else _LARGEST_WIDE
    pairs = itertools.product(
        _sizes(geometry.query_length, block, _QUERY_UNIT, largest),
        _sizes(geometry.key_length, geometry.key_block_size, _KEY_UNIT, largest),
    )
    possible = [
        (*pair, heads)
        for pair in pairs
        for heads in _divisors(call.heads_with_one_list)
        if (heads == 1 or heads * pair[0] <= largest)
        and kernel_tables.refusal(block_mask, *pair) is None
    ]
    # Tiny tiles never win where there are larger ones, and take long to count; nor do
    # halves of what lies within a block, which have the same list twice.
    least = max(map(math.prod, possible), default=0) // 16
    possible = [
        (query_tile, key_tile, heads)
        for query_tile, key_tile, heads in possible
        if query_tile * key_tile * heads >= least
        and ((2 * query_tile, key_tile, heads) not in possible or block % (2 * query_tile))
    ]
    count = functools.cache(_counter(block_mask))
    programs = call.query.shape[0] * call.query.shape[2]

    def cost(query_tile: int, key_tile: int, heads: int) -> int:
        tiles = programs // heads * count(query_tile, key_tile)
        return int(tiles * _time(heads * query_tile, key_tile))

    found = [Choice(*sizes, cost(*sizes)) for sizes in possible]
    # The larger of equals.
    return sorted(reversed(found), key=lambda choice: choice.cost)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _time(query_tile: int, key_tile: int) -> int:
    return _OVERHEAD + (query_tile + _ACCUMULATION) * (key_tile + _ACCUMULATION)


def _sizes(length: int, block: int, unit: int, largest: int) -> list[int]:
    """Returns powers of two and multiples of the block, up to what holds everything."""
    powers = [unit * 2**i for i in range(8)]
    multiples = [block * 2**i for i in range(8)]
    enough = min(size for size in powers if size >= min(length, largest))
    rounded = [size for size in multiples if size >= unit and size % _ROW_UNIT == 0]
    return sorted(size for size in {*powers, *rounded} if size <= enough)


def _counter(block_mask: BlockMask) -> Callable[[int, int], float]:
    """Returns a function of the tile sizes: tiles in the lists of a mean pattern."""
    tables = (block_mask.kv_counts, block_mask.kv_indices)
    if not all(isinstance(array, np.ndarray) for array in (*tables, block_mask.query_offset)):
        return functools.partial(_expected_tiles, block_mask)
    geometry = block_mask.geometry
    counts, indices = (
        table.reshape(-1, *table.shape[-n:]) for n, table in zip((1, 2), tables, strict=True)
    )
    # The first and the last pattern stand for all: it is an estimate.
    some = [0, -1] if len(counts) > 1 else [0]
    listed = tiles.expand(counts[some], indices[some], geometry.key_blocks)
    rows = np.pad(listed.cumsum(2, dtype=np.int32), ((0, 0), (0, 0), (1, 0))).swapaxes(0, 1)
    # sums[m, :, j] counts blocks above and left of (m, j), added up by whole rows.
    sums = np.stack([*itertools.accumulate(rows, initial=np.zeros_like(rows[0]))])

    @functools.cache
    def above(key_tile: int) -> Int[np.ndarray, "m P tiles"]:
        left, right = _touched(geometry.key_length, geometry.key_block_size, key_tile)
        return sums[..., right] - sums[..., left]

    return functools.partial(_listed_tiles, block_mask, above)


def _cut(geometry: Geometry, query_tile: int, key_tile: int) -> Geometry:
    return dataclasses.replace(geometry, query_block_size=query_tile, key_block_size=key_tile)


def _expected_tiles(block_mask: BlockMask, query_tile: int, key_tile: int) -> float:
    geometry = block_mask.geometry
    cut = _cut(geometry, query_tile, key_tile)
    share = block_mask.kv_indices.shape[-1] / geometry.key_blocks
    blocks = -(-query_tile // geometry.query_block_size) * -(-key_tile // geometry.key_block_size)
    return cut.query_blocks * cut.key_blocks * (1 - (1 - share) ** blocks)


def _listed_tiles(
    block_mask: BlockMask, above: Callable[[int], np.ndarray], query_tile: int, key_tile: int
) -> float:
    """Returns how many tiles the kernel's lists will have, for a mean pattern.

    above(key_tile)[m] counts blocks above m in each column of tiles.
    """
    geometry = block_mask.geometry
    top, bottom = _touched(geometry.query_length, geometry.query_block_size, query_tile)
    blocks = above(key_tile)
    has_blocks = blocks[bottom] > blocks[top]
    cut = _cut(geometry, query_tile, key_tile)
    seen, _, _ = tiles.rule_tiles(Dense(), cut, block_mask.query_offset)
    return np.count_nonzero(has_blocks & seen.swapaxes(0, 1)) / has_blocks.shape[1]


def _touched(
    length: int, block: int, tile: int
) -> tuple[Int[np.ndarray, "tiles"], Int[np.ndarray, "tiles"]]:
    """Returns the first block that each tile touches, and the first one behind it."""
    starts = np.arange(0, length, tile)
    stops = np.minimum(starts + tile, length)
    return starts // block, -(-stops // block)
