"""The kernel for dQ: 64 query rows a warpgroup, keys and values streamed by TMA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.differentiable import Plan, Tables
from pallas_kernels.block_sparse_attention.mosaic_gpu import kernels, pieces, softmax
from pallas_kernels.block_sparse_attention.mosaic_gpu.kernels import Entries, Mask, Place
from pallas_kernels.block_sparse_attention.mosaic_gpu.masks import TileMask
from pallas_kernels.block_sparse_attention.mosaic_gpu.rings import Ring, tile_scratch
from pallas_kernels.block_sparse_attention.mosaic_gpu.rows import Rows
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import (
    ROWS,
    Tile,
    Warpgroup,
    along_rows,
)

_Number = Int[Array, ""]
_Sum = Float[Array, "64 H"]


def query_gradient(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "BP S K H"],
    value: Float[Array, "BP S K H"],
    d_out: Float[Array, "B T N H"],
    statistics: Float[Array, "B N 2 T"],
    tables: Tables,
) -> Float[Array, "B T N H"]:
    """Returns dQ of keys and values in `pieces`.

    statistics are lse in base 2 and the shift of `differentiable`.
    """
    batch, length, heads, head_dim = query.shape
    tiling, count = plan.d_query, plan.options.pieces
    packed = plan.options.d_query_heads
    warpgroups = packed * tiling.query_tile // ROWS
    tile = (count, tiling.key_tile, head_dim)
    ring = Ring.scratch(plan.options.d_query_stages, tile, key.dtype, warpgroups)
    resident = tile_scratch((warpgroups, ROWS, head_dim), query.dtype, count)
    (gradient,) = kernels.launch(
        lambda *refs: _kernel(plan, *refs),
        (query, key, value, d_out, statistics),
        tables.d_query,
        tables,
        target=plan.target,
        outputs=(jax.ShapeDtypeStruct(query.shape, query.dtype),),
        scratch=(
            resident,
            resident,
            plgpu.Barrier(num_barriers=warpgroups, num_arrivals=2),
            ring,
            ring,
        ),
        grid=(batch, heads // packed, length // tiling.query_tile),
        compute_warpgroups=warpgroups,
    )
    return gradient


def _kernel(
    plan: Plan,
    block: Place,
    arrays: tuple[Any, ...],
    mask: Mask,
    outputs: tuple[Any, ...],
    queries: Any,
    d_outs: Any,
    ready: Any,
    keys: Any,
    values: Any,
) -> None:
    """One tile of queries; see `query_gradient` for the scratch."""
    query_ref, key_ref, value_ref, d_out_ref, statistics_ref = arrays
    (gradient_ref,) = outputs
    tiling, heads, count = plan.d_query, query_ref.shape[2], plan.options.pieces
    parts, packed = tiling.query_tile // ROWS, plan.options.d_query_heads
    batch, first_head = block.batch, block.head * packed
    # Under causality the last tiles have the longest lists: they start first.
    tile = query_ref.shape[1] // tiling.query_tile - 1 - block.tile
    entries = Entries.of(mask.lists, batch, first_head, heads, tile)
    keys, values = Ring(*keys), Ring(*values)

    def compute(index: _Number) -> None:
        warpgroup = Warpgroup(bool(plan.target.interpret))
        head, part = kernels.head_and_part(first_head, index, parts)
        rows = Rows.of(warpgroup, TileMask(plan.geometry, tiling, True), mask, batch, tile, part)
        place = pl.ds(rows.start, ROWS)
        own, d_out = (buffer.at[index] for buffer in (queries, d_outs))
        for ref, target in ((query_ref, own), (d_out_ref, d_out)):
            plgpu.copy_gmem_to_smem(ref.at[batch, place, head], target, ready.at[index])
        lse = warpgroup.load_rows(statistics_ref.at[batch, head, 0, place])
        shift = warpgroup.load_rows(statistics_ref.at[batch, head, 1, place])
        plgpu.barrier_wait(ready.at[index])
        total = _Step(plan, rows, (own,), (d_out,), lse, shift, keys, values).over(entries)
        warpgroup.store(total * plan.scores.scale, own)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, gradient_ref.at[batch, place, head])
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        kv_head = lax.div(first_head, jnp.int32(heads // key_ref.shape[2]))

        def copy(number: _Number, tile: _Number) -> None:
            place = (batch, pl.ds(tile * tiling.key_tile, tiling.key_tile), kv_head)
            keys.fill(number, pieces.places(key_ref, count, *place))
            values.fill(number, pieces.places(value_ref, count, *place))

        steps = kernels.stream(entries, jnp.int32(0), copy)
        keys.drain(steps)
        values.drain(steps)

    kernels.by_role(compute, produce, packed * parts)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a warpgroup does with each key tile of its list."""

    plan: Plan
    rows: Rows
    queries: Tile
    d_out: Tile
    lse: Float[Array, "64"]
    shift: Float[Array, "64"]
    keys: Ring
    values: Ring

    def over(self, entries: Entries) -> _Sum:
        """Returns the sum over the whole list, but for the scale."""
        total = self.rows.warpgroup.zeros(self.queries[0].shape[1])
        total, _ = kernels.walk(
            entries, jnp.int32(0), total, self.rows.sees_some, self._attend, self._skip
        )
        return total

    def _attend(self, number: _Number, tile: _Number, bits: _Number, total: _Sum) -> _Sum:
        warpgroup, scores = self.rows.warpgroup, self.plan.scores
        key, value = self.keys.wait(number), self.values.wait(number)
        lse, shift = (along_rows(x, key[0].shape[0]) for x in (self.lse, self.shift))

        def between(raw: Array) -> tuple[Array, Array]:
            logits, weights = softmax.weights(scores, raw, lse)
            return logits, self.rows.hide(weights, bits, tile, 0.0)

        (logits, weights), d_weights = warpgroup.products(
            (self.queries, key), (self.d_out, value), between
        )
        self.values.release(number)
        d_raw = softmax.gradient(scores, logits, weights, d_weights, shift)
        total = warpgroup.accumulate(total, warpgroup.split(d_raw, key), key)
        self.keys.release(number)
        return total

    def _skip(self, number: _Number, total: _Sum) -> _Sum:
        """Keeps the barriers in step."""
        for ring in (self.keys, self.values):
            ring.wait(number)
            ring.release(number)
        return total
