"""Block-sparse attention in Triton, for NVIDIA GPUs from Ampere on.

Three kernels (`kernels`) read the lists of `kernel_tables` in tiles that suit machine
and mask (`tuning`). Heads of any dimension up to 256 are computed in the next power of
two, from 16 on, but neither padded nor stored that way. Products of bfloat16 and float16
sum up in float32; those of float32 are exact float32, off the tensor cores.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import kernel_tables, triton_call
from pallas_kernels.block_sparse_attention import differentiable, tuned
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.triton import tuning
from pallas_kernels.targets import Target

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there; None when it can."""
    capability = target.compute_capability
    if target.platform != "cuda" or capability is None:
        return f"needs an NVIDIA GPU, not {target.platform}"
    if capability < 80:
        return f"needs compute capability 8.0 (Ampere) or newer, not {capability / 10}"
    dtype, head_dim = call.query.dtype, call.query.shape[-1]
    if dtype not in _DTYPES:
        return f"it takes bfloat16, float16 and float32, not {dtype}"
    if head_dim > tuning.MAX_HEAD_DIM:
        return f"head_dim={head_dim} must be at most {tuning.MAX_HEAD_DIM}"
    chosen = tuning.choose(call.block_mask, head_dim, dtype, target)
    for shape in (chosen.forward, chosen.d_query, chosen.d_key):
        reason = kernel_tables.refusal(call.block_mask, *shape.tiles)
        if reason is not None:
            return reason
    return triton_call.refusal()


def attend(call: Call, target: Target) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse)."""
    return run(tuned.pick(call, plans(call, target)), call)


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns what `autotune` may choose from, the default first."""
    return tuning.plans(call, target)


def run(plan: Plan, call: Call) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse), computed as planned."""
    from pallas_kernels.block_sparse_attention.triton import launch  # It imports triton.

    return differentiable.attend(launch, plan, call)
