"""Block maxima on Hopper GPUs, in Pallas Mosaic GPU.

Operands come by TMA and the products are WGMMA's, by what block-sparse attention has for
both: heads are padded as there, and float32 runs as three bfloat16 arrays.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_max.call import Call
from pallas_kernels.block_max.mosaic_gpu.plan import Plan
from pallas_kernels.block_max.mosaic_gpu.sight import Sight
from pallas_kernels.block_sparse_attention import mosaic_gpu
from pallas_kernels.block_sparse_attention.mosaic_gpu import pieces, tuning
from pallas_kernels.kernel_tables import Segments
from pallas_kernels.targets import Target


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there; None when it can."""
    return mosaic_gpu.machine_refusal(call.query, target)


def block_max(call: Call, target: Target) -> Float[Array, "B n M J"]:
    """Returns the maxima."""
    # They import Mosaic.
    from pallas_kernels.block_max.mosaic_gpu import kernel
    from pallas_kernels.block_sparse_attention.mosaic_gpu import softmax

    plan = Plan.of(call, target)
    segments = None
    if call.segment_ids is not None:
        query_ids, key_ids = (ids.astype(jnp.int32) for ids in call.segment_ids)
        segments = Segments(plan.queries.cut(query_ids), plan.keys.cut(key_ids))
    operands = kernel.Operands(
        pieces.split(_pad_heads(plan.queries.cut(call.query))),
        pieces.split(_pad_heads(plan.keys.cut(call.key))),
        plan.queries.cut(call.lse * softmax.LOG2_E).swapaxes(1, 2),
        Sight.of(plan, call.query_offset, segments),
        jnp.reshape(call.query_offset, 1),
        segments,
    )
    maxima = kernel.block_max(plan, operands)
    # What several warpgroups or tiles have of one block.
    maxima = maxima.reshape(*maxima.shape[:3], plan.keys.slots, -1).max(-1)
    return maxima[:, :, : plan.queries.blocks, : plan.keys.blocks]


def _pad_heads(array: Float[Array, "B L N H"]) -> Float[Array, "B L N D"]:
    head_dim = array.shape[-1]
    return jnp.pad(array, ((0, 0),) * 3 + ((0, tuning.padded(head_dim) - head_dim),))
