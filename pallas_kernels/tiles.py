"""Tile arithmetic behind `BlockMask`: the tiles a rule touches, compacted into lists.

Every function takes numpy arrays (tables built on the host) and traced ones (a traced
offset or selection): the namespace follows the arguments, so there is one
implementation of each.
"""

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.checks import shown
from pallas_kernels.geometry import Geometry, Indices, Mask
from pallas_kernels.rules import Rule

Offset = int | np.integer | Int[np.ndarray, ""] | Int[Array, ""]

# Beyond it, distances between positions reach what `Geometry` calls unlimited.
_FARTHEST = 2**29


# Tiles where none are asked for. Small ones waste less of the causal triangle, large ones less
# time on overhead: a short list wants the former, a long one the latter.
_LARGEST_RULE_TILE = 128
_LEAST_DENSE_TILE = 128
_LARGEST_DENSE_TILE = {"query": 512, "key": 256}


def namespace(array: object) -> ModuleType:
    """Returns jax.numpy for a jax array, else numpy."""
    return jnp if isinstance(array, jax.Array) else np


def as_scalar(offset: Offset) -> Int[np.ndarray, ""] | Int[Array, ""]:
    """Returns the offset as an int32 array, on the host when it is static.

    Raises:
        ValueError: it is not one integer, or far beyond any length.
    """
    dtype = np.dtype(getattr(offset, "dtype", type(offset)))
    if np.shape(offset) or not np.issubdtype(dtype, np.integer):
        raise ValueError(f"query_offset is {shown(offset)}: pass one integer")
    if not isinstance(offset, jax.Array) and abs(int(offset)) > _FARTHEST:
        raise ValueError(f"query_offset={offset} must be from -{_FARTHEST} to {_FARTHEST}")
    return namespace(offset).asarray(offset, np.int32)


def default_tile(rule: Rule, length: int, side: Literal["query", "key"]) -> int:
    """Returns the tokens in a tile where none are asked for; `BlockMask.from_rule` says which."""
    tile = rule.block_size
    if tile is None:
        quarter = 1 << max(1, length // 4).bit_length() - 1
        largest = max(_LEAST_DENSE_TILE, min(quarter, _LARGEST_DENSE_TILE[side]))
        return min(largest, length)
    while tile % 2 == 0 and tile > _LARGEST_RULE_TILE:
        tile //= 2
    return min(tile, length)


def rule_pairs(
    rule: Rule | None, head: Indices, query_position: Indices, key_position: Indices
) -> Mask | np.bool_:
    """Returns which pairs the rule allows; None allows all. Arguments broadcast."""
    if rule is None or rule.block_size is None:
        return np.True_
    size = rule.block_size
    return rule.visible(head, query_position // size, key_position // size)


def rule_tiles(rule: Rule, geometry: Geometry, offset: Offset) -> tuple[Mask, Mask, bool]:
    """Returns (active, full, is_uniform): [Hp, M, J] twice, and a fact about all tiles.

    A tile is cut into granules, the rule's blocks clipped to it. On a pair of granules
    the rule is constant and i - j covers an interval, so "some pair is visible" and
    "all pairs are" come out exactly without looking at tokens.

    active: some pair of the tile is visible.
    full: all are, and the tile does not stick out at the end.
    is_uniform: the rule is known to be constant on the pairs of every active tile.
    """
    xp = namespace(offset)
    query_low, query_high = _granules(
        geometry.query_length, geometry.query_block_size, rule, offset
    )
    query_low, query_high = query_low[:, :, None, None], query_high[:, :, None, None]
    key_low, key_high = _granules(geometry.key_length, geometry.key_block_size, rule, 0)
    some, every = geometry.spans(query_low, query_high, key_low, key_high)
    heads = np.arange(rule.pattern_heads, dtype=np.int32)[:, None, None, None, None]
    allowed = rule_pairs(rule, heads, query_low, key_low)
    allowed = xp.broadcast_to(allowed, (rule.pattern_heads, *some.shape))
    granules = (-3, -1)
    active = (allowed & some).any(granules)
    full = (allowed & every).all(granules) & _whole_tiles(geometry, xp)
    is_uniform = rule.block_size is None
    if xp is np and not is_uniform:
        is_uniform = bool((allowed | ~some).all(granules)[active].all())
    return active, full, is_uniform


def compact(kinds: Indices, most: int | None = None) -> tuple[Indices, Indices, Indices]:
    """Returns (counts, indices, kinds), int32, of the positive entries along the last axis.

    Indices ascend and repeat the last valid one past the count. Their number is that
    of the longest list on the host, the whole axis for traced values, or `most` when
    a list is known not to be longer.
    """
    if isinstance(kinds, np.ndarray):
        return _compact_on_host(kinds)
    length = kinds.shape[-1]
    counts = (kinds > 0).sum(-1, dtype=np.int32)
    capacity = length if most is None else max(1, min(most, length))
    # Sorted rows of numbers: accelerators scatter far slower than they sort.
    numbers = jnp.where(kinds > 0, np.arange(length, dtype=np.int32), length)
    numbers = jnp.sort(numbers, axis=-1)[..., :capacity]
    # What an empty row repeats is 0.
    last = jnp.take_along_axis(numbers, (counts[..., None] - 1).clip(0), axis=-1)
    indices = jnp.minimum(numbers, last % length).astype(np.int32)
    return counts, indices, jnp.take_along_axis(kinds, indices, axis=-1).astype(np.int32)


def _compact_on_host(kinds: Int[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Does as `compact`, without sorting: what is found comes in order."""
    *rows, length = kinds.shape
    flat = kinds.reshape(-1)
    is_listed = flat > 0
    counts = np.count_nonzero(is_listed.reshape(-1, length), axis=-1).astype(np.int32)
    entries = np.flatnonzero(is_listed)
    capacity = max(1, int(counts.max()))
    is_entry = np.arange(capacity) < counts[:, None]
    # What an empty row repeats is its first place.
    last = np.arange(0, flat.size, length)
    last[counts > 0] = entries[counts.cumsum()[counts > 0] - 1]

    def table(of_entries: np.ndarray, of_last: np.ndarray) -> np.ndarray:
        repeated = np.repeat(of_last.astype(np.int32)[:, None], capacity, axis=1)
        repeated[is_entry] = of_entries
        return repeated.reshape(*rows, capacity)

    indices = table(entries % length, last % length)
    return counts.reshape(rows), indices, table(flat[entries], flat[last])


def expand(counts: Indices, indices: Indices, length: int) -> Mask:
    """Undoes `compact`: returns booleans [..., length], True where an index is listed."""
    listed = np.arange(indices.shape[-1]) < counts[..., None]
    if namespace(indices) is np:
        return scatter(listed, indices, length)
    # TPUs scatter numbers one by one, and sort them first: half a minute to compile.
    return lax.platform_dependent(
        listed,
        indices,
        tpu=lambda listed, indices: _found(listed, indices, length),
        default=lambda listed, indices: scatter(listed, indices, length),
    )


def scatter(marked: Mask, indices: Indices, length: int) -> Mask:
    """Returns booleans [..., length], True at the indices that are marked."""
    xp = namespace(indices)
    beyond = xp.where(marked, indices, length)
    marks = xp.zeros((*indices.shape[:-1], length + 1), bool)
    if xp is np:
        np.put_along_axis(marks, beyond, True, axis=-1)
    else:
        marks = jnp.put_along_axis(marks, beyond, True, axis=-1, inplace=False)
    return marks[..., :length]


def _found(
    marked: Bool[Array, "... C"], indices: Int[Array, "... C"], length: int
) -> Bool[Array, "... length"]:
    """Does as `scatter`, by comparing each number with each index: nothing is stored."""
    numbers = jnp.arange(length, dtype=indices.dtype)
    return (marked[..., None] & (indices[..., None] == numbers)).any(-2)


def _granules(length: int, tile: int, rule: Rule, offset: Offset) -> tuple[Indices, Indices]:
    """First and last position of each granule, [tiles, granules of the longest].

    Tiles with fewer granules repeat their last.
    """
    starts = np.arange(0, length, tile, dtype=np.int32)
    stops = np.minimum(starts + tile, length).astype(np.int32)
    first, last = starts + as_scalar(offset), stops - 1 + as_scalar(offset)
    size = rule.block_size
    if size is None:
        return first[:, None], last[:, None]
    xp = namespace(offset)
    if xp is np:
        count = int((last // size - first // size).max()) + 1
    else:  # What a tile can touch wherever it starts.
        count = (min(tile, length) + size - 2) // size + 1
    block = first[:, None] // size + np.arange(count, dtype=np.int32)
    block = xp.minimum(block, last[:, None] // size)
    low = xp.maximum(block * size, first[:, None])
    return low, xp.minimum(block * size + size - 1, last[:, None])


def _whole_tiles(geometry: Geometry, xp: ModuleType) -> Mask:
    """False where a tile sticks out of the queries or the keys."""
    query = np.arange(1, geometry.query_blocks + 1) * geometry.query_block_size
    key = np.arange(1, geometry.key_blocks + 1) * geometry.key_block_size
    whole: Mask = xp.asarray(query <= geometry.query_length)[:, None]
    return whole & xp.asarray(key <= geometry.key_length)
