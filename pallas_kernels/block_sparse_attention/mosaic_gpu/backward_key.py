"""The kernel for dK and dV: 64 key rows a warpgroup, queries and dO streamed by TMA.

Each block has one key/value head and walks through the query heads of its group, so
that the sum over them has one order and needs no atomics.
"""

import dataclasses
from typing import Any, NamedTuple

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
    along_columns,
)
from pallas_kernels.kernel_tables import Lists

_Number = Int[Array, ""]
# The accumulators of 64 keys fill the registers of one warpgroup up to this head
# dimension. Beyond it dV is one warpgroup's and dK the other's, of the same keys.
_LARGEST_SHARED_HEAD = 128
_WARPGROUPS = 2


class _Sums(NamedTuple):
    """The gradients of 64 keys that a warpgroup adds up: both, or one and None."""

    d_key: Float[Array, "64 H"] | None
    d_value: Float[Array, "64 H"] | None


def key_gradients(
    plan: Plan,
    query: Float[Array, "BP T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "BP T N H"],
    statistics: Float[Array, "B N 2 T"],
    tables: Tables,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns (dK, dV) of queries and dO in `pieces`.

    statistics are lse in base 2 and the shift of `differentiable`.
    """
    batch, length, kv_heads, head_dim = key.shape
    tiling, stages, count = plan.d_key, plan.options.d_key_stages, plan.options.pieces
    tile = (count, tiling.query_tile, head_dim)
    ring = Ring.scratch(stages, tile, query.dtype, _WARPGROUPS)
    vectors = Ring.scratch(stages, (1, 2, tiling.query_tile), jnp.float32, _WARPGROUPS)
    parts = tiling.key_tile // ROWS
    resident = tile_scratch((parts, ROWS, head_dim), key.dtype, count)
    gradient = jax.ShapeDtypeStruct(key.shape, key.dtype)
    d_key, d_value = kernels.launch(
        lambda *refs: _kernel(plan, *refs),
        (query, key, value, d_out, statistics),
        tables.d_key,
        tables,
        target=plan.target,
        outputs=(gradient, gradient),
        scratch=(
            resident,
            resident,
            plgpu.Barrier(num_barriers=parts, num_arrivals=2),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
            ring,
            ring,
            vectors,
        ),
        grid=(batch, kv_heads, length // tiling.key_tile),
        compute_warpgroups=_WARPGROUPS,
    )
    return d_key, d_value


def _kernel(
    plan: Plan,
    block: Place,
    arrays: tuple[Any, ...],
    mask: Mask,
    outputs: tuple[Any, ...],
    keys: Any,
    values: Any,
    ready: Any,
    finished: Any,
    *streamed: Any,
) -> None:
    """One tile of keys; see `key_gradients` for the scratch."""
    query_ref, key_ref, value_ref, d_out_ref, statistics_ref = arrays
    tiling, heads, count = plan.d_key, query_ref.shape[2], plan.options.pieces
    is_shared = keys.shape[0] == _WARPGROUPS
    # Under causality the first tiles have the longest lists: they start first.
    batch, kv_head, tile = block
    group = _Group(mask.lists, batch, kv_head, tile, heads, heads // key_ref.shape[2])
    queries, d_outs, statistics = (Ring(*scratch) for scratch in streamed)

    def compute(index: _Number) -> None:
        warpgroup = Warpgroup(bool(plan.target.interpret))
        part = index if is_shared else jnp.int32(0)
        rows = Rows.of(warpgroup, TileMask(plan.geometry, tiling, False), mask, batch, tile, part)
        place = (batch, pl.ds(rows.start, ROWS), kv_head)
        own = (keys.at[part], values.at[part])

        @pl.when(index == part)
        def _load() -> None:
            for ref, target in zip((key_ref, value_ref), own, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[place], target, ready.at[part])

        plgpu.barrier_wait(ready.at[part])
        step = _Step(plan, rows, (own[0],), (own[1],), queries, d_outs, statistics)

        def run(wants_key: bool, wants_value: bool) -> None:
            sums = step.over(group, wants_key, wants_value)
            if not is_shared:  # What is written next, the other may still read.
                plgpu.barrier_arrive(finished)
                plgpu.barrier_wait(finished)
            targets = tuple(ref.at[place] for ref in outputs)
            _store(warpgroup, sums, plan.scores.scale, own, targets)

        if is_shared:
            run(True, True)
        else:
            lax.cond(index == 0, lambda: run(True, False), lambda: run(False, True))

    def produce() -> None:
        def stream(member: _Number, number: _Number) -> _Number:
            head, entries = group.member(member)

            def copy(number: _Number, tile: _Number) -> None:
                place = pl.ds(tile * tiling.query_tile, tiling.query_tile)
                queries.fill(number, pieces.places(query_ref, count, batch, place, head))
                statistics.fill(number, (statistics_ref.at[batch, head, :, place],))
                d_outs.fill(number, pieces.places(d_out_ref, count, batch, place, head))

            return kernels.stream(entries, number, copy)

        steps = lax.fori_loop(0, group.size, stream, jnp.int32(0))
        for ring in (queries, statistics, d_outs):
            ring.drain(steps)

    kernels.by_role(compute, produce, _WARPGROUPS)


def _store(
    warpgroup: Warpgroup,
    sums: _Sums,
    scale: float,
    buffers: tuple[Any, Any],
    targets: tuple[Any, ...],
) -> None:
    """Writes dK and dV, those there are, through the shared memory of K and V."""
    for total, factor, buffer, target in zip(sums, (scale, 1.0), buffers, targets, strict=True):
        if total is not None:
            warpgroup.store(total * factor, buffer)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Group:
    """The query heads that share a key/value head, and their lists for one tile of keys."""

    lists: Lists
    batch: _Number
    kv_head: _Number
    tile: _Number
    heads: int
    size: int

    def member(self, number: _Number) -> tuple[_Number, Entries]:
        """Returns a query head and its list."""
        head = self.kv_head * self.size + number
        return head, Entries.of(self.lists, self.batch, head, self.heads, self.tile)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a warpgroup does with each query tile of its lists."""

    plan: Plan
    rows: Rows
    keys: Tile
    values: Tile
    queries: Ring
    d_outs: Ring
    statistics: Ring

    def over(self, group: _Group, wants_key: bool, wants_value: bool) -> _Sums:
        """Returns the sums over the lists of a group, of dK but for the scale."""
        zeros = self.rows.warpgroup.zeros(self.keys[0].shape[1])
        sums = _Sums(zeros if wants_key else None, zeros if wants_value else None)

        def add(member: _Number, carry: tuple[_Sums, _Number]) -> tuple[_Sums, _Number]:
            sums, number = carry
            _, entries = group.member(member)
            return kernels.walk(
                entries, number, sums, self.rows.sees_some, self._attend, self._skip
            )

        sums, _ = lax.fori_loop(0, group.size, add, (sums, jnp.int32(0)))
        return sums

    def _attend(self, number: _Number, tile: _Number, bits: _Number, sums: _Sums) -> _Sums:
        warpgroup, scores = self.rows.warpgroup, self.plan.scores
        query, (statistics,) = self.queries.wait(number), self.statistics.wait(number)
        d_out, (d_key, d_value) = self.d_outs.wait(number), sums

        lse = along_columns(warpgroup.load_columns(statistics.at[0]), ROWS)
        raw = warpgroup.product(self.keys, query)
        logits, weights = softmax.weights(scores, raw, lse)
        weights = self.rows.hide(weights, bits, tile, 0.0)
        products = (self.values, d_out)
        if d_value is None:
            d_weights = warpgroup.product(*products)
        elif d_key is None:
            d_value = warpgroup.accumulate(d_value, warpgroup.split(weights, d_out), d_out)
        else:
            d_value, d_weights = warpgroup.accumulate_beside(
                d_value, warpgroup.split(weights, d_out), d_out, products
            )
        self.d_outs.release(number)
        if d_key is not None:
            # Loaded late: a vector along the columns takes registers.
            shift = along_columns(warpgroup.load_columns(statistics.at[1]), ROWS)
            d_raw = softmax.gradient(scores, logits, weights, d_weights, shift)
            d_key = warpgroup.accumulate(d_key, warpgroup.split(d_raw, query), query)
        plgpu.commit_smem()  # TMA may overwrite what was loaded.
        self.statistics.release(number)
        self.queries.release(number)
        return _Sums(d_key, d_value)

    def _skip(self, number: _Number, sums: _Sums) -> _Sums:
        """Keeps the barriers in step."""
        for ring in (self.queries, self.statistics, self.d_outs):
            ring.wait(number)
            ring.release(number)
        return sums
