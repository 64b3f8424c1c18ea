"""Block-sparse attention in plain JAX, sub-quadratic in time and memory everywhere.

Rows of query tiles (`rows`) are scanned; each reads the key tiles on its list one by
one, with an online softmax, in a loop as long as the list. So the time follows the
listed tiles, and nothing of size T x S exists. The backward pass computes the scores
once more from the saved log-sum-exp, and adds to dK and dV in place: five matrix
products per tile, where separate passes for dQ and for dK, dV need seven.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import short_blocks, xla_loops
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.rows import Layout
from pallas_kernels.block_sparse_attention.xla_loops import Plan, Problem
from pallas_kernels.targets import Target

# Scores computed together. Enough parallel work for an accelerator, 64 MiB in float32;
_SCORES_IN_FLIGHT = 2**24
# on a CPU 128 KiB, which a core's cache holds a few times over, and which products of small
# blocks, a microsecond each, are worth starting for.
_SCORES_IN_CACHE = 2**15

_Arrays = TypeVar("_Arrays", bound=tuple[Array, ...])
_Rows = Float[Array, "R Q H"]
_Stats = Float[Array, "R Q"]
_Tiles = Float[Array, "U P H"]
_Residuals = tuple[_Rows, _Tiles, _Tiles, Problem, _Rows, _Stats]


def refusal(call: Call, target: Target) -> None:
    """Returns None: it runs everywhere."""


def attend(call: Call, target: Target) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse)."""
    segment_ids = call.segment_ids
    block_mask, blocks = short_blocks.joined(call.block_mask)
    layout = Layout.of(call.query, call.key, block_mask)
    query_segments = key_segments = None
    if segment_ids is not None:
        query_segments = layout.query_segments(segment_ids[0])
        key_segments = layout.key_segments(segment_ids[1])
    out, lse = _attend_rows(
        Plan(
            layout.geometry,
            block_mask.inner_rule,
            call.scores,
            _lanes(layout, _SCORES_IN_FLIGHT),
            _lanes(layout, _SCORES_IN_CACHE),
        ),
        layout.query_rows(call.query),
        layout.key_tiles(call.key),
        layout.key_tiles(call.value),
        Problem(layout.lists(block_mask, blocks), query_segments, key_segments),
    )
    return layout.from_query_rows(out), layout.from_query_rows(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_rows(
    plan: Plan, query: _Rows, key: _Tiles, value: _Tiles, problem: Problem
) -> tuple[_Rows, _Stats]:
    return _on_platform(xla_loops.forward, plan, query, key, value, problem)


def _attend_rows_fwd(
    plan: Plan, query: _Rows, key: _Tiles, value: _Tiles, problem: Problem
) -> tuple[tuple[_Rows, _Stats], _Residuals]:
    inputs = (query, key, value, problem)
    out, lse = _on_platform(xla_loops.forward, plan, *inputs)
    return (out, lse), (*inputs, out, lse)


def _attend_rows_bwd(
    plan: Plan, residuals: _Residuals, cotangents: tuple[_Rows, _Stats]
) -> tuple[_Rows, _Tiles, _Tiles, None]:
    grads = _on_platform(xla_loops.backward, plan, *residuals, *cotangents)
    return (*grads, None)


_attend_rows.defvjp(_attend_rows_fwd, _attend_rows_bwd)


def _on_platform(loop: Callable[..., _Arrays], plan: Plan, *arrays: Any) -> _Arrays:
    """Runs the loop, on a CPU with rows enough for its cache and no more."""
    in_cache = dataclasses.replace(plan, lanes=plan.cpu_lanes)
    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(loop, in_cache),
        default=functools.partial(loop, plan),
    )


def _lanes(layout: Layout, scores: int) -> int:
    """Rows that are computed together, up to a number of scores: a divisor of the programs."""
    geometry = layout.geometry
    tile = layout.folded * geometry.query_block_size * geometry.key_block_size
    most = max(1, min(layout.programs, scores // tile))
    return max(n for n in range(1, most + 1) if layout.programs % n == 0)
