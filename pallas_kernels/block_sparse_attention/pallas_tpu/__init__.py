"""Block-sparse attention on TPU, in Pallas.

Three kernels, forward, dQ and dK with dV, walk lists of tiles that lie in scalar memory
(`walk`, `flat`), in tiles that `tuning` chooses. Absolute stripes, which lists of large
tiles cannot skip between, are gathered first (`strided`). Every head dimension runs as
it is: a block holds whole rows, and what is no multiple of 128 leaves lanes idle.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import kernel_tables
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.pallas_tpu import flat, lists, strided, tuning
from pallas_kernels.targets import Target


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there; None when it can."""
    if target.platform != "tpu":
        return f"needs a TPU, this is {target.platform}"
    if call.query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{call.query.dtype} is not supported: cast to float32"
    choice = tuning.choose(call)
    if choice is None:
        return kernel_tables.refusal(call.block_mask, *tuning.SMALLEST)
    group = call.query.shape[2] // call.key.shape[2] // choice.heads
    most = 2 ** (flat.TILE_BITS - (group - 1).bit_length())
    if max(call.query.shape[1], call.key.shape[1]) > most * min(choice.tiles):
        return f"tiles of {choice.query_tile} x {choice.key_tile} number more than {most}"
    return None


def attend(call: Call, target: Target) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse)."""
    parts = _stripes(call)
    return lists.attend(call, target) if parts is None else strided.attend(parts, call, target)


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns what `autotune` may choose from, the default first; nothing for stripes."""
    return lists.plans(call, target) if _stripes(call) is None else ()


def run(plan: Plan, call: Call) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse), computed as planned."""
    return lists.run(plan, call)


def _stripes(call: Call) -> strided.Parts | None:
    """Returns the parts of a call whose stripes are to be gathered; None for other calls."""
    parts = strided.split(call)
    return parts if parts is not None and strided.is_faster(parts, call) else None
