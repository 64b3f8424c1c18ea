"""The forward kernel: 64 query rows a warpgroup, keys and values streamed by TMA."""

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
from pallas_kernels.block_sparse_attention.mosaic_gpu.kernels import Entries, Mask, Place, Turns
from pallas_kernels.block_sparse_attention.mosaic_gpu.masks import TileMask
from pallas_kernels.block_sparse_attention.mosaic_gpu.rings import Ring, tile_scratch
from pallas_kernels.block_sparse_attention.mosaic_gpu.rows import Rows
from pallas_kernels.block_sparse_attention.mosaic_gpu.softmax import Running
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import (
    ROWS,
    Tile,
    Warpgroup,
    along_rows,
)

_Number = Int[Array, ""]
_State = tuple[Float[Array, "64 H"], Running]


def attention(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "BP S K H"],
    value: Float[Array, "BP S K H"],
    tables: Tables,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (out, lse), see `differentiable.Backend`, of keys and values in `pieces`."""
    batch, length, heads, head_dim = query.shape
    count = plan.options.pieces
    tiling, stages = plan.forward, plan.options.forward_stages
    packed = plan.options.forward_heads
    warpgroups = packed * tiling.query_tile // ROWS
    ring = Ring.scratch(stages, (count, tiling.key_tile, head_dim), key.dtype, warpgroups)
    out, lse = kernels.launch(
        lambda *refs: _kernel(plan, *refs),
        (query, key, value),
        tables.forward,
        tables,
        target=plan.target,
        outputs=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch=(
            tile_scratch((warpgroups, ROWS, head_dim), query.dtype, count),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups),
            ring,
            ring,
            plgpu.Barrier(num_arrivals=warpgroups),
        ),
        grid=(batch, heads // packed, length // tiling.query_tile),
        compute_warpgroups=warpgroups,
    )
    return out, lse


def _kernel(
    plan: Plan,
    block: Place,
    arrays: tuple[Any, ...],
    mask: Mask,
    outputs: tuple[Any, ...],
    queries: Any,
    lse: Any,
    queries_ready: Any,
    keys: Any,
    values: Any,
    turns: Any,
) -> None:
    """One tile of queries; see `attention` for the scratch."""
    query_ref, key_ref, value_ref = arrays
    out_ref, lse_ref = outputs
    tiling, heads, count = plan.forward, query_ref.shape[2], plan.options.pieces
    parts, packed = tiling.query_tile // ROWS, plan.options.forward_heads
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
        own = queries.at[index]
        plgpu.copy_gmem_to_smem(query_ref.at[batch, place, head], own, queries_ready.at[index])
        plgpu.barrier_wait(queries_ready.at[index])
        has_turns = plan.options.takes_turns and packed * parts > 1
        step = _Step(plan, rows, (own,), keys, values, Turns(turns if has_turns else None, index))
        total, running = step.over(entries)
        scale, logs = running.finish()
        warpgroup.store(total * along_rows(scale, total.shape[1]), own)
        lse.at[index][...] = logs
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, out_ref.at[batch, place, head])
        plgpu.copy_smem_to_gmem(lse.at[index], lse_ref.at[batch, head, place])
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
    keys: Ring
    values: Ring
    turns: Turns

    def over(self, entries: Entries) -> _State:
        """Returns the sums over the whole list."""
        warpgroup = self.rows.warpgroup
        running = Running(warpgroup.rows_of(softmax.LOWEST), warpgroup.rows_of(0.0))
        state = (warpgroup.zeros(self.queries[0].shape[1]), running)

        self.turns.begin()
        state, _ = kernels.walk(
            entries, jnp.int32(0), state, self.rows.sees_some, self._attend, self._skip
        )
        self.turns.end()
        return state

    def _attend(self, number: _Number, tile: _Number, bits: _Number, state: _State) -> _State:
        total, running = state
        warpgroup, scores = self.rows.warpgroup, self.plan.scores
        key = self.keys.wait(number)
        # Not from registers, which would halve what the product reads: the assembler that
        # Mosaic brings (CUDA 12.9's as well, 13.5's not) overwrites them for the next step.
        raw = warpgroup.product(self.queries, key, meanwhile=self.turns.swap)
        self.keys.release(number)
        logits = softmax.raw_logits(scores, raw)
        logits = self.rows.hide(logits, bits, tile, -jnp.inf)
        running, shrink, weights = running.add(logits, softmax.factor(scores))
        total = total * along_rows(shrink, total.shape[1])
        factors = warpgroup.split(weights, key)
        # The softmax is over before the turn is passed on.
        total, running, factors = lax.optimization_barrier((total, running, factors))
        self.turns.arrive()
        value = self.values.wait(number)
        self.turns.wait()
        total = warpgroup.accumulate(total, factors, value)
        self.values.release(number)
        return total, running

    def _skip(self, number: _Number, state: _State) -> _State:
        """Keeps the barriers in step."""
        self.keys.wait(number)
        self.keys.release(number)
        self.turns.swap()
        self.values.wait(number)
        self.values.release(number)
        self.turns.swap()
        return state
