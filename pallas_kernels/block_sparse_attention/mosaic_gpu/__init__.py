"""Block-sparse attention on Hopper GPUs, in Pallas Mosaic GPU.

Three kernels, forward, dQ and dK with dV, each with warpgroups that compute and one that
copies: it reads the lists and lets TMA fill rings of tiles in shared memory (`rings`),
whose products are WGMMA's (`warpgroup`). Heads are padded to 64, 128, 192 or 256. Products
sum up in float32. Of bfloat16 and float16, weights and their gradients are rounded to the
input's type before they are multiplied; float32 runs as three bfloat16 arrays (`pieces`),
six times the products. Each product is exact, their sum is not: WGMMA cuts off what it adds,
so dK and dV, sums over all queries, lose digits with the length (docs/benchmarks.md).
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import kernel_tables
from pallas_kernels.block_sparse_attention import differentiable, tuned
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.mosaic_gpu import tuning
from pallas_kernels.targets import Target

_HOPPER = 90


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there; None when it can."""
    reason = machine_refusal(call.query, target)
    if reason is not None:
        return reason
    for sizes in tuning.tiles(call):
        reason = kernel_tables.refusal(call.block_mask, *sizes)
        if reason is not None:
            return reason
    return None


def reservation(call: Call) -> str | None:
    """Returns why it is not taken where the best one is asked for; None if it is."""
    if call.query.dtype != jnp.float32:
        return None
    return (
        "float32 gradients of keys and values are off by 7e-5 of the largest at 4096 tokens, "
        "3e-4 at 16384: name it to have them all the same"
    )


def machine_refusal(query: Float[Array, "B T N H"], target: Target) -> str | None:
    """Returns why no kernel can multiply such queries there; None when one can."""
    capability = target.compute_capability
    if target.platform != "cuda" or capability is None:
        return f"needs an NVIDIA GPU of the Hopper generation, not {target.platform}"
    if capability != _HOPPER:
        return (
            f"needs compute capability 9.0 (Hopper), not {capability / 10}: only Hopper has "
            "the wgmma instructions"
        )
    dtype, head_dim = query.dtype, query.shape[-1]
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, not {dtype}"
    if head_dim > tuning.LARGEST_HEAD:
        return f"head_dim={head_dim} must be at most {tuning.LARGEST_HEAD}"
    return _import_error()


def attend(call: Call, target: Target) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse)."""
    return run(tuned.pick(call, plans(call, target)), call)


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns what `autotune` may choose from, the default first."""
    return tuning.plans(call, target)


def run(plan: Plan, call: Call) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse), computed as planned."""
    from pallas_kernels.block_sparse_attention.mosaic_gpu import backend  # It imports Mosaic.

    return differentiable.attend(backend, plan, call, head_multiple=tuning.HEAD_MULTIPLE)


@functools.cache
def _import_error() -> str | None:
    """Returns why Mosaic GPU cannot be imported; None when it can."""
    try:
        import jax.experimental.pallas.mosaic_gpu  # noqa: F401
    except ImportError as error:
        return f'Mosaic GPU cannot be imported: pip install "sparseformer_jax[cuda]" ({error})'
    return None
