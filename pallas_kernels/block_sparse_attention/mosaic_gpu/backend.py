"""The kernels as `differentiable.Backend` wants them.

The backward pass has one kernel for dQ, over key lists, and one for dK and dV, over
query lists: each gradient is summed by one warpgroup in one order.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.differentiable import Plan, Tables
from pallas_kernels.block_sparse_attention.mosaic_gpu import pieces, softmax
from pallas_kernels.block_sparse_attention.mosaic_gpu.backward_key import key_gradients
from pallas_kernels.block_sparse_attention.mosaic_gpu.backward_query import query_gradient
from pallas_kernels.block_sparse_attention.mosaic_gpu.forward import attention


def forward(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    tables: Tables,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (out, lse), see `differentiable.Backend`."""
    return attention(plan, query, pieces.split(key), pieces.split(value), tables)


def backward(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    tables: Tables,
    lse: Float[Array, "B N T"],
    shift: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns (dQ, dK, dV), see `differentiable.Backend`."""
    statistics = jnp.stack([lse * softmax.LOG2_E, shift], axis=2)
    d_out = d_out.astype(query.dtype)
    arrays = (query, key, value, d_out)
    queries, keys, values, d_outs = map(pieces.split, arrays)  # What a kernel streams.
    d_query = query_gradient(plan, query, keys, values, d_out, statistics, tables)
    d_key, d_value = key_gradients(plan, queries, key, value, d_outs, statistics, tables)
    return d_query, d_key, d_value
