"""The backward kernels: dQ along the rows of queries, dK and dV along those of keys."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import kernel_tables
from pallas_kernels.block_sparse_attention.differentiable import Plan, Tables
from pallas_kernels.block_sparse_attention.pallas_tpu import flat, tile
from pallas_kernels.block_sparse_attention.pallas_tpu.flat import Lists
from pallas_kernels.block_sparse_attention.pallas_tpu.operands import joined, operands
from pallas_kernels.block_sparse_attention.pallas_tpu.walk import Here, Walk


def backward(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    tables: Tables,
    lse: Float[Array, "B N T"],
    shift: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns (dQ, dK, dV), see `differentiable.Backend`."""
    arrays = (query, key, value, d_out, lse, shift)
    return _d_query(plan, tables, *arrays), *_d_key_value(plan, tables, *arrays)


def _d_query(
    plan: Plan,
    tables: Tables,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    shift: Float[Array, "B N T"],
) -> Float[Array, "B T N H"]:
    tiling, packed = plan.d_query, plan.options.heads
    batch, _, heads, head_dim = query.shape
    rows = packed * tiling.query_tile
    walk = Walk(
        name="block_sparse_attention_d_query",
        target=plan.target,
        batch=batch,
        heads=heads // packed,
        group=heads // packed // key.shape[2],
        rows_are="queries",
        tiles=key.shape[1] // tiling.key_tile,
    )
    inputs = operands(
        tiling,
        "queries",
        heads=packed,
        queries=[query, d_out],
        keys=[key, value],
        statistics=[lse, shift],
        segments=tables.segments,
    )
    (d_query,) = walk.run(
        lambda *refs: _d_query_kernel(plan, *refs),
        flat.single(tables.d_query),
        tables.query_offset,
        inputs,
        [jax.ShapeDtypeStruct((rows, head_dim), query.dtype)],
        [(rows, n) for n in (tile.LANES, tile.LANES, head_dim)],
    )
    return joined(d_query, packed)


def _d_query_kernel(
    plan: Plan,
    here: Here,
    query: Any,
    d_out: Any,
    key: Any,
    value: Any,
    lse: Any,
    shift: Any,
    *rest: Any,
) -> None:
    *segments, d_query, lse_column, shift_column, sums = rest

    @pl.when(here.is_first)
    def _() -> None:
        lse_column[...] = tile.as_column(lse[...])
        shift_column[...] = tile.as_column(shift[...])
        sums[...] = jnp.zeros_like(sums)

    def add(is_masked: bool) -> None:
        logits = plan.scores.logits(tile.product(query[...], key[...], transposed=True))
        width = logits.shape[1]
        weights = jnp.exp(logits - tile.across(lse_column[...], width))
        if is_masked:
            ids = None
            if segments:
                ids = (segments[0][...].reshape(-1, 1), segments[1][...])
            mask = tile.visible(plan, plan.d_query, here, ids, keys_first=False)
            weights = jnp.where(mask, weights, 0)
        d_weights = tile.product(d_out[...], value[...], transposed=True)
        d_logits = weights * (d_weights - tile.across(shift_column[...], width))
        d_raw = d_logits * plan.scores.slope(logits)
        sums[...] += tile.product(d_raw.astype(key.dtype), key[...])

    here.visit(add)

    @pl.when(here.is_last)
    def _() -> None:
        d_query[...] = sums[...].astype(d_query.dtype)


def _d_key_value(
    plan: Plan,
    tables: Tables,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    shift: Float[Array, "B N T"],
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    tiling, packed = plan.d_key, plan.options.heads
    batch, _, kv_heads, head_dim = key.shape
    group = query.shape[2] // packed // kv_heads
    lists, shared = _lists_by_key_head(tables.d_key, kv_heads)
    walk = Walk(
        name="block_sparse_attention_d_key_value",
        target=plan.target,
        batch=batch,
        heads=kv_heads,
        group=group,
        rows_are="keys",
        tiles=query.shape[1] // tiling.query_tile,
        repeats=group if shared else 1,
    )
    inputs = operands(
        tiling,
        "keys",
        heads=packed,
        queries=[query, d_out],
        keys=[key, value],
        statistics=[lse, shift],
        segments=tables.segments,
    )
    d_key, d_value = walk.run(
        lambda *refs: _d_key_value_kernel(plan, *refs),
        lists,
        tables.query_offset,
        inputs,
        [jax.ShapeDtypeStruct((tiling.key_tile, head_dim), key.dtype)] * 2,
        [(tiling.key_tile, head_dim)] * 2,
    )
    return joined(d_key), joined(d_value)


def _lists_by_key_head(lists: kernel_tables.Lists, kv_heads: int) -> tuple[Lists, bool]:
    """Returns lists with K patterns or one, and whether a group shares its list.

    Otherwise a row holds the lists of all heads of the group one after the other.
    """
    patterns = lists.counts.shape[1]
    if patterns <= kv_heads:
        return flat.single(lists), True

    def regroup(table: Any) -> Array:
        batch, _, *rest = table.shape
        return table.reshape(batch, kv_heads, -1, *rest).swapaxes(2, 3)

    return Lists(*map(regroup, lists)), False


def _d_key_value_kernel(
    plan: Plan,
    here: Here,
    query: Any,
    d_out: Any,
    key: Any,
    value: Any,
    lse: Any,
    shift: Any,
    *rest: Any,
) -> None:
    """Computes scores as [keys, queries]: no product needs a transposed left side."""
    *segments, d_key, d_value, key_sums, value_sums = rest

    @pl.when(here.is_first)
    def _() -> None:
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    def add(is_masked: bool) -> None:
        logits = plan.scores.logits(tile.product(key[...], query[...], transposed=True))
        weights = jnp.exp(logits - lse[...])
        if is_masked:
            ids = None
            if segments:
                ids = (segments[0][...], segments[1][...].reshape(-1, 1))
            mask = tile.visible(plan, plan.d_key, here, ids, keys_first=True)
            weights = jnp.where(mask, weights, 0)
        value_sums[...] += tile.product(weights.astype(d_out.dtype), d_out[...])
        d_weights = tile.product(value[...], d_out[...], transposed=True)
        d_raw = weights * (d_weights - shift[...]) * plan.scores.slope(logits)
        key_sums[...] += tile.product(d_raw.astype(query.dtype), query[...])

    here.visit(add)

    @pl.when(here.is_last)
    def _() -> None:
        d_key[...] = key_sums[...].astype(d_key.dtype)
        d_value[...] = value_sums[...].astype(d_value.dtype)
