"""Attention by lists of tiles: the kernels behind the wrapper that all backends share."""

import dataclasses
import types
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import differentiable, tuned
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.pallas_tpu import backward, forward, tuning
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target

# Enough for `autotune` to correct an estimate.
_MOST_PLANS = 4
_KERNELS = types.SimpleNamespace(forward=forward.forward, backward=backward.backward)


def attend(call: Call, target: Target) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse), differentiable, in the tiles that `tuning` or `autotune` chose."""
    return run(tuned.pick(call, plans(call, target)), call)


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns plans with the tiles of least estimated cost, the best first."""
    best = tuning.choices(call)[:_MOST_PLANS]
    return tuple(plan(call, target, [choice.tiles] * 3, choice.heads) for choice in best)


def plan(call: Call, target: Target, tiles: Sequence[tuple[int, int]], heads: int = 1) -> Plan:
    """Returns the plan of a call.

    Args:
        call: what to compute.
        target: the machine.
        tiles: tokens in a query and a key tile of the forward kernel, of that for dQ,
            and of that for dK and dV.
        heads: query heads with one list that lie side by side in a query tile.
    """
    forward, d_query, d_key = (Tiling.of(call.block_mask, *sizes) for sizes in tiles)
    geometry, options = call.block_mask.geometry, tuning.Options(heads)
    return Plan(geometry, forward, d_query, d_key, call.scores, target, options)


def run(plan: Plan, call: Call) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse), computed as planned; widens float16, which cannot be loaded."""
    dtype = call.query.dtype
    if dtype == jnp.float16:
        query, key, value = (x.astype(jnp.float32) for x in (call.query, call.key, call.value))
        call = dataclasses.replace(call, query=query, key=key, value=value)
    out, lse = differentiable.attend(_KERNELS, plan, call)
    return out.astype(dtype), lse
