"""The kernel: keys stay in shared memory, the queries that see them are streamed past them.

A block of the grid has a tile of keys for a head of the result. Its warpgroups have a part of
the keys each and share the queries: the tiles and heads that a maximum is taken over are steps
of one warpgroup, and it alone writes its columns.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_max.mosaic_gpu.pairs import Pairs
from pallas_kernels.block_max.mosaic_gpu.path import Path
from pallas_kernels.block_max.mosaic_gpu.plan import QUERY_TILE, WARPGROUPS, Plan
from pallas_kernels.block_max.mosaic_gpu.result import Result
from pallas_kernels.block_max.mosaic_gpu.sight import Sight
from pallas_kernels.block_sparse_attention.mosaic_gpu import kernels, pieces, rings, softmax
from pallas_kernels.block_sparse_attention.mosaic_gpu.rings import Ring, tile_scratch
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import Tile, Warpgroup
from pallas_kernels.kernel_tables import Segments

_Number = Int[Array, ""]
_Best = tuple[Float[Array, "64"], ...]


class Operands(NamedTuple):
    """What the kernel reads, padded to whole tiles: arrays, and references to them inside it.

    Attributes:
        query: [BP, T, N, H] in `pieces`.
        key: [BP, S, K, H] in `pieces`.
        lse: [B, N, T] in base 2.
        sight: which queries to stream.
        query_offset: [1], the position of the first query.
        segments: segment ids, if given.
    """

    query: Any
    key: Any
    lse: Any
    sight: Sight
    query_offset: Any
    segments: Segments | None


def block_max(plan: Plan, operands: Operands) -> Float[Array, "B n M J"]:
    """Returns the maxima: rows of whole tiles, and a column for every `Plan.width` keys."""
    batch, heads, _ = operands.lse.shape
    head_dim, dtype = operands.key.shape[-1], operands.key.dtype
    rows = plan.queries.slots
    shape = (
        batch,
        heads // plan.heads,
        rows + -rows % QUERY_TILE,
        plan.keys.tiles * WARPGROUPS * plan.columns,
    )
    (maxima,) = kernels.start(
        lambda *refs: _kernel(plan, *refs),
        (operands,),
        target=plan.target,
        outputs=(jax.ShapeDtypeStruct(shape, jnp.float32),),
        scratch=(
            tile_scratch((WARPGROUPS, plan.pieces, plan.part, head_dim), dtype, plan.pieces),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=plan.pieces),
            Ring.scratch(plan.stages, (plan.pieces, QUERY_TILE, head_dim), dtype, WARPGROUPS),
            plgpu.SMEM((WARPGROUPS, plan.columns, QUERY_TILE), jnp.float32),
        ),
        grid=(*shape[:2], plan.keys.tiles),
        compute_warpgroups=WARPGROUPS,
        has_barriers=True,
    )
    return maxima


def _kernel(
    plan: Plan,
    block: kernels.Place,
    given: Operands,
    outputs: tuple[Any, ...],
    keys: Any,
    keys_ready: Any,
    queries: Any,
    exchange: Any,
) -> None:
    """One tile of keys; see `block_max` for the scratch."""
    (out,) = outputs
    # Under causality the first tiles are seen by most queries: they start first.
    batch, head, tile = block
    path = Path.of(plan, given.sight, batch, tile)
    ring = Ring(*queries)

    def compute(index: _Number) -> None:
        warpgroup = Warpgroup(bool(plan.target.interpret))
        part = tile * WARPGROUPS + index
        own, start = rings.pieces_of(keys, index), part * plan.part
        place = (pl.ds(start, plan.part), lax.div(head, jnp.int32(plan.kv_group)))
        source = pieces.places(given.key, plan.pieces, batch, *place)
        rings.load(source, own, keys_ready.at[index])
        result = Result(
            plan, warpgroup, out.at[batch, head], part * plan.columns, exchange.at[index]
        )
        result.clear(path)
        plgpu.barrier_wait(keys_ready.at[index])
        segments = jax.tree.map(lambda ref: ref.at[batch], given.segments)
        pairs = Pairs(plan, warpgroup, start, given.query_offset[0], segments)
        lse = given.lse.at[batch, pl.ds(head * plan.heads, plan.heads)]
        step = _Step(plan, warpgroup, path, pairs, own, ring, lse)

        def visit(row: _Number, number: _Number) -> None:
            none = tuple(warpgroup.rows_of(0.0) for _ in range(plan.columns))
            result.store(row, path.over_steps(row, number, none, step.add))

        path.over_rows(visit)

    def produce() -> None:
        def fill(number: _Number, tile: _Number, member: _Number, _: None) -> None:
            place = (pl.ds(tile * QUERY_TILE, QUERY_TILE), head * plan.heads + member)
            ring.fill(number, pieces.places(given.query, plan.pieces, batch, *place))

        ring.drain(path.over_rows(lambda row, number: path.over_steps(row, number, None, fill)))

    kernels.by_role(compute, produce, WARPGROUPS)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a warpgroup does with a query tile.

    Attributes:
        plan: the static facts.
        warpgroup: whose step it is.
        path: the steps.
        pairs: what is visible.
        keys: its part of the keys.
        queries: the ring of query tiles.
        lse: of the heads that the maximum is over, [heads, T].
    """

    plan: Plan
    warpgroup: Warpgroup
    path: Path
    pairs: Pairs
    keys: Tile
    queries: Ring
    lse: Any

    def add(self, number: _Number, tile: _Number, member: _Number, best: _Best) -> _Best:
        """Returns the largest weights of each query for each column after a step."""
        # Asked for before the product: nobody waits for global memory.
        lse = self.warpgroup.load_rows(self.lse.at[member, pl.ds(tile * QUERY_TILE, QUERY_TILE)])
        raw = self.warpgroup.product(self.queries.wait(number), self.keys)
        self.queries.release(number)
        raw = self.pairs.hide(raw, tile, self.path.is_full(tile))
        # The largest product has the largest logit: one of each block is enough.
        return tuple(
            jnp.maximum(known, self._weights(self._column(raw, number).max(axis=1), lse))
            for number, known in enumerate(best)
        )

    def _column(self, raw: Float[Array, "64 C"], number: int) -> Float[Array, "64 c"]:
        first = number * self.plan.width
        return lax.slice(raw, (0, first), (QUERY_TILE, first + self.plan.width))

    def _weights(self, peak: Float[Array, "64"], lse: Float[Array, "64"]) -> Float[Array, "64"]:
        _, weights = softmax.weights(self.plan.scores, peak, lse)
        # A cap would lift -inf to a number.
        return jnp.where(peak == -jnp.inf, 0.0, weights)
