"""Lists of tiles as flat rows of visits, small enough for a TPU's scalar memory.

A TPU core walks a grid step after step and fetches the tiles of later steps early, so
the numbers of all tiles lie in scalar memory, SMEM, when a kernel starts. A visit takes
8 bytes of its 1 MiB: a word of row, tile and flags, and the bits of the tile. A kernel
call gets a `Chunk` of the lists, 2^16 visits or 512 KiB at most: for 131072 tokens one
pattern in tiles of 512 x 512, or four in tiles of 1024 x 1024.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels import kernel_tables

MOST_VISITS = 2**16

# The word of a visit, from its lowest bit: flags, tile, row.
IS_FIRST, IS_LAST, IS_ACTIVE = 1, 2, 4
FLAG_BITS, TILE_BITS, ROW_BITS = 3, 15, 14


class Lists(NamedTuple):
    """Lists whose rows are G lists one after the other; else as in `kernel_tables`.

    Attributes:
        counts: [b, P, M, G].
        tiles: [b, P, M, G, C].
        bits: [b, P, M, G, C].
    """

    counts: Int[Array, "b P M G"]
    tiles: Int[Array, "b P M G C"]
    bits: Int[Array, "b P M G C"]


def single(lists: kernel_tables.Lists) -> Lists:
    """Returns lists of which each is a row of its own, G = 1."""
    return Lists(*(jnp.asarray(table)[:, :, :, None] for table in lists))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The lists that one kernel call walks: parts of the batch, the patterns, the rows."""

    batches: int
    patterns: int
    rows: int

    @classmethod
    def of(cls, lists: Lists) -> "Chunk":
        """Returns the largest chunk whose visits fit."""
        batches, patterns, rows, members, longest = lists.tiles.shape
        # Row numbers of a chunk have ROW_BITS.
        most = min(max(1, MOST_VISITS // (members * longest)), 2**ROW_BITS)
        if rows > most:
            # As many chunks as it takes, of like size: their rows overlap least.
            return cls(1, 1, -(-rows // -(-rows // most)))
        fitting = MOST_VISITS // (rows * members * longest)
        if fitting < patterns:
            return cls(1, _divisor(patterns, fitting), rows)
        return cls(_divisor(batches, fitting // patterns), patterns, rows)


class Visits(NamedTuple):
    """What a kernel prefetches: b * P patterns one after the other, E visits each.

    Attributes:
        most: visits of the pattern that has most.
        words: flags, tile and row of each visit.
        bits: which granules of the tile are visible, as in `kernel_tables.Lists`.
    """

    most: Int[Array, ""]
    words: Int[Array, "bPE"]
    bits: Int[Array, "bPE"]


def flatten(lists: Lists, member_shift: int) -> Visits:
    """Returns the visits of all rows, row by row.

    Tile t of list g of a row is numbered g * 2^member_shift + t. A row without entries
    is visited once, not active, so that its result is written. Past its end a pattern
    repeats its last visit, without flags: nothing is fetched again.
    """
    batches, patterns, rows, members, longest = lists.tiles.shape
    programs, capacity = batches * patterns, rows * members * longest
    is_empty = lists.counts.sum(-1, keepdims=True) == 0
    visits = lists.counts.at[..., :1].max(is_empty.astype(jnp.int32))
    ends = visits.reshape(programs, rows * members).cumsum(-1)
    starts = ends - visits.reshape(ends.shape)
    step = jnp.arange(capacity)
    visit = jnp.minimum(step, ends[:, -1:] - 1)
    # The list that a visit belongs to is the last one that starts no later.
    marks = jnp.zeros((programs, capacity), jnp.int32)
    marks = marks.at[jnp.arange(programs)[:, None], starts].add(1, mode="drop")
    owner = _pick(marks.cumsum(-1) - 1, visit)
    entry = owner * longest + visit - _pick(starts, owner)
    row, member = owner // members, owner % members
    tile = _pick(lists.tiles.reshape(programs, capacity), entry) + (member << member_shift)
    flags = (
        IS_FIRST * (visit == _pick(starts[:, ::members], row))
        + IS_LAST * (visit == _pick(ends[:, members - 1 :: members], row) - 1)
        + IS_ACTIVE * ~_pick(is_empty.reshape(programs, rows), row)
    )
    flags = jnp.where(step == visit, flags, 0)
    words = row << (TILE_BITS + FLAG_BITS) | tile << FLAG_BITS | flags
    bits = _pick(lists.bits.reshape(programs, capacity), entry)
    return Visits(ends[:, -1].max(), words.reshape(-1), bits.reshape(-1))


def _pick(
    table: Shaped[Array, "programs n"], index: Int[Array, "programs E"]
) -> Shaped[Array, "programs E"]:
    return jnp.take_along_axis(table, index, axis=-1)


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if number % n == 0)
