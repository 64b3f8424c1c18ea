"""The Triton kernels: forward, dQ, and dK with dV, one program per list.

Arrays are row-major, [B, T, N, H] and [B, S, K, H], lengths in whole tiles. Everything
static is in `spec`, see `spec.Spec`. A program walks over the entries of its list, so
sums have one order and every run gives the same bits: no atomics.

An entry without bits is visible throughout, and jumps over all masking. The jump does
not keep Triton from pipelining the loop: short lists fill the pipeline once, where two
loops, for full and for partial tiles, would fill it twice. Two habits come with that.
Tiles are loaded right before their first use: shared memory is read where the load
stands, and what is read early stays in registers across the jump, which spills on
Ampere. And the number of the next tile is read one entry ahead, so that no address waits
for it.

Logits are kept as x, with base-2 logits x * spec.factor: so the factor melts into the
exponent, exp2(x * factor - peak), one multiply-add.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.block_sparse_attention.triton.parts import (
    d_logits,
    key_start,
    listed,
    load_keys,
    load_queries,
    located,
    logits,
    query_start,
    row_start,
    store_keys,
    store_queries,
    visible,
)

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Below every logit, and finite: the difference of two is never NaN.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
@no_type_check
def forward(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    counts: tl.tensor,
    tiles: tl.tensor,
    bits: tl.tensor,
    offsets: tl.tensor,
    query_ids: tl.tensor,
    key_ids: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    spec: tl.constexpr,
) -> None:
    """Writes out and lse (natural) of a query tile."""
    batch, head, tile = located(spec.query_tiles, spec.heads)
    tile = _longest_first(tile, spec)
    entries, count = listed(counts, batch, head, tile, spec)
    start = query_start(batch, head, tile, spec)
    keys = key_start(batch, head // spec.group, 0, spec)
    q = load_queries(query + start, spec)
    i, j = tl.arange(0, spec.query_tile), tl.arange(0, spec.key_tile)[None, :]
    peak = tl.full([spec.query_tile], _LOWEST, tl.float32)
    total = tl.full([spec.query_tile], 0.0, tl.float32)
    mixed = tl.full([spec.query_tile, spec.head_width], 0.0, tl.float32)
    following = tl.load(tiles + entries)
    for slot in range(count):
        other, word = following, tl.load(bits + entries + slot)
        following = tl.load(tiles + entries + tl.minimum(slot + 1, count - 1))
        place = keys + other.to(tl.int64) * spec.key_step
        k = load_keys(key + place, spec)
        x = logits(tl.dot(q, tl.trans(k), input_precision=spec.precision), spec)
        if word != 0:
            seen = visible(
                word, batch, tile, other, i[:, None], j, offsets, query_ids, key_ids, spec
            )
            x = tl.where(seen, x, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(x, 1) * spec.factor)
        weights = tl.exp2(x * spec.factor - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        peak, total = new_peak, total * shrink + tl.sum(weights, 1)
        v = load_keys(value + place, spec)
        mixed *= shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=spec.precision)
    is_empty = total == 0
    total = tl.where(is_empty, 1, total)
    store_queries(out + start, mixed / total[:, None], spec)
    logs = tl.where(is_empty, float("-inf"), (peak + tl.log2(total)) * _LN_2)
    tl.store(lse + row_start(batch, head, spec) + tile * spec.query_tile + i, logs)


@triton.jit
@no_type_check
def d_query(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    counts: tl.tensor,
    tiles: tl.tensor,
    bits: tl.tensor,
    offsets: tl.tensor,
    query_ids: tl.tensor,
    key_ids: tl.tensor,
    lse: tl.tensor,
    shift: tl.tensor,
    d_out: tl.tensor,
    gradient: tl.tensor,
    spec: tl.constexpr,
) -> None:
    """Writes dQ of a query tile."""
    batch, head, tile = located(spec.query_tiles, spec.heads)
    tile = _longest_first(tile, spec)
    entries, count = listed(counts, batch, head, tile, spec)
    start = query_start(batch, head, tile, spec)
    keys = key_start(batch, head // spec.group, 0, spec)
    q, d_o = load_queries(query + start, spec), load_queries(d_out + start, spec)
    i, j = tl.arange(0, spec.query_tile), tl.arange(0, spec.key_tile)[None, :]
    rows = row_start(batch, head, spec) + tile * spec.query_tile + i
    log_total, mean = tl.load(lse + rows)[:, None] * _LOG2_E, tl.load(shift + rows)[:, None]
    d_q = tl.full([spec.query_tile, spec.head_width], 0.0, tl.float32)
    following = tl.load(tiles + entries)
    for slot in range(count):
        other, word = following, tl.load(bits + entries + slot)
        following = tl.load(tiles + entries + tl.minimum(slot + 1, count - 1))
        place = keys + other.to(tl.int64) * spec.key_step
        k = load_keys(key + place, spec)
        x = logits(tl.dot(q, tl.trans(k), input_precision=spec.precision), spec)
        weights = tl.exp2(x * spec.factor - log_total)
        if word != 0:
            seen = visible(
                word, batch, tile, other, i[:, None], j, offsets, query_ids, key_ids, spec
            )
            weights = tl.where(seen, weights, 0.0)
        v = load_keys(value + place, spec)
        d_weights = tl.dot(d_o, tl.trans(v), input_precision=spec.precision)
        d_x = d_logits(x, weights * (d_weights - mean), spec).to(k.dtype)
        d_q = tl.dot(d_x, k, d_q, input_precision=spec.precision)
    store_queries(gradient + start, d_q * spec.scale, spec)


@triton.jit
@no_type_check
def d_key(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    counts: tl.tensor,
    tiles: tl.tensor,
    bits: tl.tensor,
    offsets: tl.tensor,
    query_ids: tl.tensor,
    key_ids: tl.tensor,
    lse: tl.tensor,
    shift: tl.tensor,
    d_out: tl.tensor,
    key_gradient: tl.tensor,
    value_gradient: tl.tensor,
    spec: tl.constexpr,
) -> None:
    """Writes dK and dV of a key tile: sums over the query heads that read it."""
    batch, kv_head, tile = located(spec.key_tiles, spec.kv_heads)
    start = key_start(batch, kv_head, tile, spec)
    k, v = load_keys(key + start, spec), load_keys(value + start, spec)
    i, j = tl.arange(0, spec.query_tile), tl.arange(0, spec.key_tile)[:, None]
    d_k = tl.full([spec.key_tile, spec.head_width], 0.0, tl.float32)
    d_v = tl.full([spec.key_tile, spec.head_width], 0.0, tl.float32)
    for head in range(kv_head * spec.group, (kv_head + 1) * spec.group):
        entries, count = listed(counts, batch, head, tile, spec)
        queries = query_start(batch, head, 0, spec)
        following = tl.load(tiles + entries)
        for slot in range(count):
            other, word = following, tl.load(bits + entries + slot)
            following = tl.load(tiles + entries + tl.minimum(slot + 1, count - 1))
            place = queries + other.to(tl.int64) * spec.query_step
            q = load_queries(query + place, spec)
            rows = row_start(batch, head, spec) + other * spec.query_tile + i
            log_total = tl.load(lse + rows)[None, :] * _LOG2_E
            # Transposed, [keys, queries]: the left factor of both gradients.
            x = logits(tl.dot(k, tl.trans(q), input_precision=spec.precision), spec)
            weights = tl.exp2(x * spec.factor - log_total)
            if word != 0:
                seen = visible(
                    word, batch, other, tile, i[None, :], j, offsets, query_ids, key_ids, spec
                )
                weights = tl.where(seen, weights, 0.0)
            d_o = load_queries(d_out + place, spec)
            d_v = tl.dot(weights.to(d_o.dtype), d_o, d_v, input_precision=spec.precision)
            d_weights = tl.dot(v, tl.trans(d_o), input_precision=spec.precision)
            mean = tl.load(shift + rows)[None, :]
            d_x = d_logits(x, weights * (d_weights - mean), spec).to(q.dtype)
            d_k = tl.dot(d_x, q, d_k, input_precision=spec.precision)
    store_keys(key_gradient + start, d_k * spec.scale, spec)
    store_keys(value_gradient + start, d_v, spec)


@triton.jit
@no_type_check
def _longest_first(tile: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Returns tiles turned round: causal lists grow, and the last must not start last."""
    if spec.is_causal:
        tile = spec.query_tiles - 1 - tile
    return tile
