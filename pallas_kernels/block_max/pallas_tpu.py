"""Block maxima as a TPU kernel: one product per tile, the maxima stay in VMEM.

Scores are computed transposed, keys in sublanes and queries in lanes: the maximum over a
key block is then one over whole registers, and little more is done with a score than to
compare it. The scale, the cap, lse and exp follow where only one number per query and
key block is left. An output block has 128 key blocks in its lanes; the key tiles that
they come from are read one after the other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import precision
from pallas_kernels.block_max.call import Call
from pallas_kernels.block_max.tpu_grid import LANES, SUBLANES, Facts, Place, Plan, Ref
from pallas_kernels.geometry import Mask
from pallas_kernels.targets import Target


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there; None when it can."""
    if target.platform != "tpu":
        return f"needs a TPU, not {target.platform}"
    if call.query.dtype == jnp.float64:
        return "a TPU kernel has no float64: cast query and key to float32"
    return None


def block_max(call: Call, target: Target) -> Float[Array, "B n M J"]:
    """Returns the maxima."""
    plan = Plan.of(call)
    facts, segments = [jnp.reshape(call.query_offset, 1)], []
    if call.segment_ids is not None:
        for axis, ids in zip((plan.queries, plan.keys), call.segment_ids, strict=True):
            ids = axis.cut(ids.astype(jnp.int32))
            tiles = ids.reshape(len(ids), axis.tiles, axis.tile)
            facts += [tiles.min(-1), tiles.max(-1)]
            segments.append(ids[:, None])
    query, key = (
        axis.cut(array).swapaxes(1, 2)
        for axis, array in ((plan.queries, call.query), (plan.keys, call.key))
    )
    if query.dtype == jnp.float16:  # Not a type of the matrix unit.
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    lse = plan.queries.cut(call.lse).swapaxes(1, 2)[:, :, None]
    maxima = _call(plan, target, len(facts), query, key)(*facts, query, key, lse, *segments)
    maxima = maxima.reshape(*maxima.shape[:2], -1, maxima.shape[-1])
    return maxima[:, :, : plan.queries.blocks, : plan.keys.blocks]


def _call(
    plan: Plan,
    target: Target,
    num_facts: int,
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
) -> Any:
    """Returns the kernel as a function of arrays: facts, then blocks of the grid."""
    batch, heads, _, head_dim = query.shape
    query_tile, key_tile = plan.queries.tile, plan.keys.tile

    def block(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
        def index_map(*arguments: Any) -> tuple[Any, ...]:
            place = Place.of(plan, Facts(*arguments[6:]), *arguments[:6])
            return index(place)

        return pl.BlockSpec(shape, index_map)

    in_specs = [
        block((1, 1, query_tile, head_dim), lambda p: (p.batch, p.query_head, p.query_tile, 0)),
        block((1, 1, key_tile, head_dim), lambda p: (p.batch, p.key_head, p.nearest_key_tile, 0)),
        block((1, 1, 1, query_tile), lambda p: (p.batch, p.query_head, 0, p.query_tile)),
    ]
    if num_facts > 1:
        in_specs += [
            block((1, 1, query_tile), lambda p: (p.batch, 0, p.query_tile)),
            block((1, 1, key_tile), lambda p: (p.batch, 0, p.nearest_key_tile)),
        ]
    heads = key.shape[1] if plan.over_group else heads
    rows, columns, *inner = plan.grid
    slots = plan.queries.blocks_in_tile
    return pl.pallas_call(
        functools.partial(_kernel, plan, num_facts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_facts,
            grid=(batch, heads, rows, columns, *inner),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, 1, 1, slots, LANES), lambda b, n, i, j, *_: (b, n, i, 0, j)),
            scratch_shapes=[pltpu.VMEM((LANES, query_tile), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, rows, slots, columns * LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",) * 2
        ),
        interpret=target.interpret,
        name="block_max",
    )


def _kernel(plan: Plan, num_facts: int, *refs: Ref) -> None:
    facts = Facts(*refs[:num_facts])
    query, key, lse, *segments, out, peaks = refs[num_facts:]
    part, step = pl.program_id(4), pl.program_id(5)
    place = Place.of(plan, facts, *(pl.program_id(axis) for axis in range(6)))

    @pl.when((part == 0) & (step == 0))
    def _no_weights() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    @pl.when(step == 0)
    def _no_peaks() -> None:
        peaks[...] = jnp.full(peaks.shape, -jnp.inf, peaks.dtype)

    def read_tile(is_full: bool) -> None:
        raw = lax.dot_general(
            key[0, 0],
            query[0, 0],
            (((1,), (1,)), ((), ())),
            precision=precision.exact(query.dtype),
            preferred_element_type=jnp.float32,
        )
        if not is_full:
            raw = jnp.where(_mask(plan, place, facts.offset[0], segments), raw, -jnp.inf)
        blocks = plan.keys.blocks_in_tile
        found = raw.reshape(blocks, -1, raw.shape[-1]).max(1)
        row = lax.div(step * blocks, np.int32(plan.keys.tiles_in_block))
        at = pl.ds(pl.multiple_of(row, blocks), blocks)
        peaks[at] = jnp.maximum(peaks[at], found)

    is_visible, is_full = place.is_visible(facts), place.is_full(plan, facts)
    pl.when(is_visible & is_full)(lambda: read_tile(True))
    pl.when(is_visible & ~is_full)(lambda: read_tile(False))

    @pl.when(step == plan.steps - 1)
    def _finish() -> None:
        raw = peaks[...]
        logits = jnp.where(raw == -jnp.inf, -jnp.inf, plan.scores.logits(raw))
        rows = (logits - lse[0, 0]).T
        rows = rows.reshape(plan.queries.blocks_in_tile, -1, LANES).max(1)
        out[0, 0, 0] = jnp.maximum(out[0, 0, 0], jnp.exp(rows))


def _mask(plan: Plan, place: Place, offset: Array, segments: list[Ref]) -> Mask:
    """Returns [keys, queries]: which pairs of a tile are visible."""
    keys, queries = plan.keys.tile, plan.queries.tile
    query = place.query_tile * queries + lax.broadcasted_iota(jnp.int32, (1, queries), 1)
    key = place.key_tile * keys + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
    mask = plan.geometry.pairs(offset + plan.queries.token(query), plan.keys.token(key))
    if not segments:
        return mask
    query_ids, key_ids = (ids[0] for ids in segments)
    key_ids = jnp.broadcast_to(key_ids, (SUBLANES, keys)).T[:, :1]
    return mask & (query_ids == key_ids)
