"""The forward kernel: softmax online, one key tile of the list after the other."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.differentiable import Plan, Tables
from pallas_kernels.block_sparse_attention.pallas_tpu import flat, tile
from pallas_kernels.block_sparse_attention.pallas_tpu.operands import (
    joined,
    joined_statistics,
    operands,
)
from pallas_kernels.block_sparse_attention.pallas_tpu.walk import Here, Walk


def forward(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    tables: Tables,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (out, lse), see `differentiable.Backend`."""
    tiling, packed = plan.forward, plan.options.heads
    batch, _, heads, head_dim = query.shape
    rows = packed * tiling.query_tile
    walk = Walk(
        name="block_sparse_attention_forward",
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
        queries=[query],
        keys=[key, value],
        segments=tables.segments,
    )
    out, lse = walk.run(
        lambda *refs: _kernel(plan, *refs),
        flat.single(tables.forward),
        tables.query_offset,
        inputs,
        [
            jax.ShapeDtypeStruct((rows, head_dim), query.dtype),
            jax.ShapeDtypeStruct((1, rows), jnp.float32),
        ],
        [(rows, n) for n in (tile.LANES, tile.LANES, head_dim)],
    )
    return joined(out, packed), joined_statistics(lse, packed)


def _kernel(plan: Plan, here: Here, query: Any, key: Any, value: Any, *rest: Any) -> None:
    *segments, out, lse, peak, total, sums = rest

    @pl.when(here.is_first)
    def _() -> None:
        peak[...] = jnp.full_like(peak, tile.LEAST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def add(is_masked: bool) -> None:
        logits = plan.scores.logits(tile.product(query[...], key[...], transposed=True))
        if is_masked:
            ids = None
            if segments:
                ids = (segments[0][...].reshape(-1, 1), segments[1][...])
            mask = tile.visible(plan, plan.forward, here, ids, keys_first=False)
            logits = jnp.where(mask, logits, tile.MASKED)
        before = peak[...]
        after = jnp.maximum(before, logits.max(1, keepdims=True))
        weights = jnp.exp(logits - tile.across(after, logits.shape[1]))
        shrink = jnp.exp(before - after)
        peak[...] = after
        total[...] = shrink * total[...] + weights.sum(1, keepdims=True)
        products = tile.product(weights.astype(value.dtype), value[...])
        sums[...] = tile.across(shrink, sums.shape[1]) * sums[...] + products

    here.visit(add)

    @pl.when(here.is_last)
    def _() -> None:
        is_empty = total[...] == 0
        divisor = jnp.where(is_empty, 1, total[...])
        out[...] = (sums[...] / tile.across(divisor, sums.shape[1])).astype(out.dtype)
        lse[...] = tile.as_row(jnp.where(is_empty, -jnp.inf, peak[...] + jnp.log(divisor)))
