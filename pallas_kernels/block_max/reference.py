"""The truth that tests compare with: all weights at once, then a maximum per block."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_max.call import Call
from pallas_kernels.geometry import Mask
from pallas_kernels.targets import Target


def refusal(call: Call, target: Target) -> None:
    """Returns None: it runs everywhere."""


def block_max(call: Call, target: Target) -> Float[Array, "B n M J"]:
    """Returns the maxima of [B, N, T, S] weights."""
    dtype, geometry = call.lse.dtype, call.geometry
    key = jnp.repeat(call.key.astype(dtype), call.group, axis=2)
    raw = jnp.einsum("btnh,bsnh->bnts", call.query.astype(dtype), key, precision="highest")
    log_weights = call.scores.logits(raw) - call.lse.swapaxes(1, 2)[..., None]
    mask = _token_mask(call)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, log_weights, 0)), 0)
    rows, columns = geometry.query_blocks, geometry.key_blocks
    ragged = (
        rows * geometry.query_block_size - geometry.query_length,
        columns * geometry.key_block_size - geometry.key_length,
    )
    weights = jnp.pad(weights, ((0, 0), (0, 0), *((0, n) for n in ragged)))
    blocks = weights.reshape(*weights.shape[:2], rows, -1, columns, geometry.key_block_size)
    blocks = blocks.max((-3, -1))
    if not call.over_group:
        return blocks
    return blocks.reshape(len(blocks), -1, call.group, rows, columns).max(2)


def _token_mask(call: Call) -> Mask:
    """Returns [b, 1, T, S] with b = B or 1."""
    geometry = call.geometry
    query = jnp.arange(geometry.query_length)[:, None] + call.query_offset
    mask = geometry.pairs(query, jnp.arange(geometry.key_length))[None, None]
    if call.segment_ids is None:
        return mask
    query_ids, key_ids = call.segment_ids
    return mask & (query_ids[:, None, :, None] == key_ids[:, None, None])
