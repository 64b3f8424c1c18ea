"""The Triton kernel of block maxima: one program per row of output blocks.

A row is what a tile of queries yields: several blocks, or a part of one, when a block is
larger than a tile. Its program walks over the key tiles that the queries may see; what
lies beyond is zero beforehand. The maximum over the keys of a block comes first, so that
scale, cap, lse and exp act on one number per query and block.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.triton.parts import located, logits

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def block_max(
    query: tl.tensor,
    key: tl.tensor,
    lse: tl.tensor,
    starts: tl.tensor,
    stops: tl.tensor,
    offset: tl.tensor,
    query_ids: tl.tensor,
    key_ids: tl.tensor,
    out: tl.tensor,
    spec: tl.constexpr,
) -> None:
    """Writes the columns that a row of blocks may see."""
    batch, head, row = located(spec.row_programs, spec.row_heads)
    batch = batch.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * spec.rows
    at = (first + tl.arange(0, spec.rows)[:, None]) * spec.columns
    at += tl.arange(0, spec.columns_in_tile)[None, :]
    q, position, log_total, tokens = _queries(query, lse, offset, batch, head, row, 0, spec)
    for column in range(tl.load(starts + row), tl.load(stops + row)):
        best = tl.full([spec.rows, spec.columns_in_tile], 0.0, tl.float32)
        for part in range(spec.parts):
            if spec.parts > 1:
                q, position, log_total, tokens = _queries(
                    query, lse, offset, batch, head, row, part, spec
                )
            peak = tl.full([spec.query_tile, spec.columns_in_tile], float("-inf"), tl.float32)
            for piece in range(spec.key_pieces):
                tile = column * spec.key_pieces + piece
                index = tile * spec.key_tile + tl.arange(0, spec.key_tile)
                others = batch * spec.keys + index
                k = _load(key, others * spec.kv_heads + head // spec.heads_per_key, spec)
                raw = tl.dot(q, tl.trans(k), input_precision=spec.precision)
                seen = _seen(position[:, None], _key_token(index, spec)[None, :], spec)
                if spec.has_segments:
                    ids = tl.load(query_ids + tokens)
                    seen &= ids[:, None] == tl.load(key_ids + others)[None, :]
                peak = tl.maximum(peak, _over_keys(tl.where(seen, raw, float("-inf")), spec))
            # A cap would lift -inf to a number.
            x = tl.where(peak > float("-inf"), logits(peak, spec) * spec.factor, peak)
            best = tl.maximum(best, _over_queries(tl.exp2(x - log_total[:, None]), spec))
        tl.store(out + at + column * spec.columns_in_tile, best)


@triton.jit
@no_type_check
def _queries(
    query: tl.tensor,
    lse: tl.tensor,
    offset: tl.tensor,
    batch: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    part: tl.tensor,
    spec: tl.constexpr,
) -> tl.tuple:
    """Returns queries, their positions, base-2 lse, and which of [B T] they are."""
    tile = row * spec.query_pieces + part % spec.query_pieces
    index = tile * spec.query_tile + tl.arange(0, spec.query_tile)
    tokens = batch * spec.queries + index
    heads = tokens * spec.heads + (head * spec.heads_per_row + part // spec.query_pieces)
    position = tl.load(offset) + _query_token(index, spec)
    return _load(query, heads, spec), position, tl.load(lse + heads) * _LOG2_E, tokens


@triton.jit
@no_type_check
def _load(pointer: tl.tensor, rows: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns heads, given which they are in [B T N], zeros beyond their end."""
    dim = tl.arange(0, spec.head_width)[None, :]
    pointers = pointer + rows[:, None] * spec.head_dim + dim
    if spec.head_width == spec.head_dim:
        return tl.load(pointers)
    return tl.load(pointers, mask=dim < spec.head_dim, other=0.0)


@triton.jit
@no_type_check
def _query_token(index: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    return _token(index, spec.query_axis.block, spec.query_axis.padded, spec.query_axis.length)


@triton.jit
@no_type_check
def _key_token(index: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    return _token(index, spec.key_axis.block, spec.key_axis.padded, spec.key_axis.length)


@triton.jit
@no_type_check
def _token(
    index: tl.tensor, block: tl.constexpr, padded: tl.constexpr, length: tl.constexpr
) -> tl.tensor:
    """Returns the token at an index of the padded sequence, see `axis.Axis.token`."""
    if padded != block:
        within = tl.minimum(index % padded, block - 1)
        index = index // padded * block + within
    return tl.minimum(index, length - 1)


@triton.jit
@no_type_check
def _seen(query: tl.tensor, key: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns which pairs of positions the limits allow."""
    earliest = key + spec.least
    if spec.prefix_length > 0:
        earliest = tl.where(key < spec.prefix_length, key + spec.prefix_least, earliest)
    return (query >= earliest) & (query <= key + spec.most)


@triton.jit
@no_type_check
def _over_keys(raw: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns the maximum over the keys of each block in a tile."""
    if spec.columns_in_tile == 1:
        return tl.max(raw, 1)[:, None]
    blocks = tl.reshape(raw, [spec.query_tile, spec.columns_in_tile, spec.keys_in_column])
    return tl.max(blocks, 2)


@triton.jit
@no_type_check
def _over_queries(weights: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns the maximum over the queries of each block in a tile."""
    if spec.rows == spec.query_tile:
        return weights
    blocks = tl.reshape(weights, [spec.rows, spec.queries_in_row, spec.columns_in_tile])
    return tl.max(blocks, 1)
