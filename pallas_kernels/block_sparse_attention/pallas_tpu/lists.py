"""Attention by lists of tiles: the kernels behind the wrapper that all backends share."""

import dataclasses
import types
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention import differentiable
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.pallas_tpu import backward, forward, tuning
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target

_KERNELS = types.SimpleNamespace(forward=forward.forward, backward=backward.backward)


def attend(
    call: Call, target: Target, tiles: Sequence[tuple[int, int]] | None = None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse), differentiable.

    Args:
        call: what to compute. float16, which the compiler cannot load, is widened.
        target: the machine.
        tiles: tokens in a query and a key tile of the forward kernel, of that for dQ,
            and of that for dK and dV. None means what `tuning` chooses.
    """
    if tiles is None:
        choice = tuning.choose(call)
        if choice is None:
            raise ValueError("no tiles can take this block_mask: see refusal")
        tiles = [choice.tiles] * 3
    dtype = call.query.dtype
    if dtype == jnp.float16:
        query, key, value = (x.astype(jnp.float32) for x in (call.query, call.key, call.value))
        call = dataclasses.replace(call, query=query, key=key, value=value)
    out_tiling, d_query, d_key = (Tiling.of(call.block_mask, *sizes) for sizes in tiles)
    plan = Plan(call.block_mask.geometry, out_tiling, d_query, d_key, call.scores, target)
    out, lse = differentiable.attend(_KERNELS, plan, call)
    return out.astype(dtype), lse
