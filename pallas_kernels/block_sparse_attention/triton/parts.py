"""What the Triton kernels have in common: tiles of arrays, lists, logits and masks.

Triton compiles the source of functions, with the globals that they see: `no_type_check`
keeps tests that check annotations at run time from wrapping them.
"""

from typing import no_type_check

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def located(tiles: tl.constexpr, heads: tl.constexpr) -> tl.tuple:
    """Returns (batch, head, tile) of a program, tiles of a head side by side.

    The grid has one axis: CUDA's others end at 65535.
    """
    number = tl.program_id(0)
    return number // (heads * tiles), number // tiles % heads, number % tiles


@triton.jit
@no_type_check
def query_start(
    batch: tl.tensor, head: tl.tensor, tile: tl.tensor, spec: tl.constexpr
) -> tl.tensor:
    """Returns where a tile begins in [B, T, N, H]."""
    token = batch.to(tl.int64) * spec.queries + tile * spec.query_tile
    return (token * spec.heads + head) * spec.head_dim


@triton.jit
@no_type_check
def key_start(batch: tl.tensor, head: tl.tensor, tile: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns where a tile begins in [B, S, K, H]."""
    token = batch.to(tl.int64) * spec.keys + tile * spec.key_tile
    return (token * spec.kv_heads + head) * spec.head_dim


@triton.jit
@no_type_check
def row_start(batch: tl.tensor, head: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns where the numbers of a head begin in [B, N, T]."""
    return (batch.to(tl.int64) * spec.heads + head) * spec.queries


@triton.jit
@no_type_check
def load_queries(pointer: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns the tile of queries that begins at a pointer."""
    return _load(pointer, spec.query_tile, spec.heads, spec)


@triton.jit
@no_type_check
def load_keys(pointer: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns the tile of keys or values that begins at a pointer."""
    return _load(pointer, spec.key_tile, spec.kv_heads, spec)


@triton.jit
@no_type_check
def store_queries(pointer: tl.tensor, tile: tl.tensor, spec: tl.constexpr) -> None:
    """Writes a tile that is shaped like one of queries."""
    _store(pointer, tile, spec.query_tile, spec.heads, spec)


@triton.jit
@no_type_check
def store_keys(pointer: tl.tensor, tile: tl.tensor, spec: tl.constexpr) -> None:
    """Writes a tile that is shaped like one of keys."""
    _store(pointer, tile, spec.key_tile, spec.kv_heads, spec)


@triton.jit
@no_type_check
def listed(
    counts: tl.tensor, batch: tl.tensor, head: tl.tensor, row: tl.tensor, spec: tl.constexpr
) -> tl.tuple:
    """Returns (first, count) of the list of a tile; lists of batch 1 serve all."""
    pattern = head // spec.heads_per_pattern
    if spec.lists_have_batch:
        pattern += batch * spec.patterns
    place = pattern.to(tl.int64) * spec.list_rows + row
    return place * spec.capacity, tl.load(counts + place)


@triton.jit
@no_type_check
def logits(raw: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns x of raw products: the base-2 logits over spec.factor."""
    x = raw
    if spec.slant != 1.0:
        x = raw * spec.slant
    if spec.is_capped:
        # tanh(x), without a pole: exp2 ends in 0 or infinity.
        x = 1 - 2 / (tl.exp2(x * (2 * _LOG2_E)) + 1)
    return x


@triton.jit
@no_type_check
def d_logits(x: tl.tensor, gradient: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns the gradient of raw products over spec.scale, from that of logits."""
    if spec.is_capped:
        return gradient * (1 - x * x)
    return gradient


@triton.jit
@no_type_check
def visible(
    word: tl.tensor,
    batch: tl.tensor,
    query_tile: tl.tensor,
    key_tile: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    offsets: tl.tensor,
    query_ids: tl.tensor,
    key_ids: tl.tensor,
    spec: tl.constexpr,
) -> tl.tensor:
    """Returns which pairs of a partial tile are visible.

    i and j count queries and keys in the tile, and broadcast against each other; word
    has the bits of its list entry.
    """
    # Rows and columns meet only in shifts and comparisons of what changes with the entry:
    # nothing of the size of a tile is left for the compiler to keep across the loop.
    row_word = word >> (i // spec.query_granule * spec.key_granules)
    seen = ((row_word >> (j // spec.key_granule)) & 1) != 0
    i += query_tile * spec.query_tile
    j += key_tile * spec.key_tile
    if spec.keys_are_ragged:
        seen &= j < spec.visible_keys
    if spec.is_limited:
        aligned = j - tl.load(offsets + batch * spec.offsets_have_batch)
        earliest = aligned + spec.least
        if spec.prefix_length > 0:
            earliest = tl.where(j < spec.prefix_length, aligned + spec.prefix_least, earliest)
        seen &= i >= earliest
        if spec.has_most:
            seen &= i <= aligned + spec.most
    if spec.has_segments:
        ids = tl.load(query_ids + batch.to(tl.int64) * spec.queries + i)
        seen &= ids == tl.load(key_ids + batch.to(tl.int64) * spec.keys + j)
    return seen


@triton.jit
@no_type_check
def _pointers(
    pointer: tl.tensor, rows: tl.constexpr, heads: tl.constexpr, spec: tl.constexpr
) -> tl.tensor:
    # Only the start needs 64 bits: offsets in a tile are 32 bits wide, for fewer registers.
    row, dim = tl.arange(0, rows), tl.arange(0, spec.head_width)
    return pointer + (row[:, None] * (heads * spec.head_dim) + dim[None, :])


@triton.jit
@no_type_check
def _load(
    pointer: tl.tensor, rows: tl.constexpr, heads: tl.constexpr, spec: tl.constexpr
) -> tl.tensor:
    """Loads rows of a head, zeros beyond its end."""
    pointers = _pointers(pointer, rows, heads, spec)
    if spec.head_width == spec.head_dim:
        return tl.load(pointers)
    dim = tl.arange(0, spec.head_width)
    return tl.load(pointers, mask=dim[None, :] < spec.head_dim, other=0.0)


@triton.jit
@no_type_check
def _store(
    pointer: tl.tensor,
    tile: tl.tensor,
    rows: tl.constexpr,
    heads: tl.constexpr,
    spec: tl.constexpr,
) -> None:
    pointers = _pointers(pointer, rows, heads, spec)
    tile = tile.to(pointer.dtype.element_ty)
    if spec.head_width == spec.head_dim:
        tl.store(pointers, tile)
    else:
        dim = tl.arange(0, spec.head_width)
        tl.store(pointers, tile, mask=dim[None, :] < spec.head_dim)
