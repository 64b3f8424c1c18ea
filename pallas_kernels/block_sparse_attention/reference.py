"""The truth that tests compare with: dense masked attention, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.targets import Target


def refusal(call: Call, target: Target) -> None:
    """Returns None: it runs everywhere."""


def attend(call: Call, target: Target) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse) from all [B, N, T, S] scores, in float32 or wider."""
    query, key, value = call.query, call.key, call.value
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    num_heads = query.shape[2]
    group = num_heads // key.shape[2]
    key, value = (jnp.repeat(x.astype(dtype), group, axis=2) for x in (key, value))
    raw = jnp.einsum("btnh,bsnh->bnts", query.astype(dtype), key, precision="highest")
    logits = call.scores.logits(raw)
    mask = _token_mask(call.block_mask, call.segment_ids, num_heads)
    lowest = jnp.finfo(dtype).min
    peak = jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=lowest)
    peak = jax.lax.stop_gradient(peak)
    # Masked before and after exp: neither its value nor its slope is ever NaN.
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - peak, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total, value, precision="highest")
    lse = jnp.where(is_empty, -jnp.inf, peak + jnp.log(total))[..., 0]
    return out.astype(query.dtype), lse.swapaxes(1, 2)


def _token_mask(
    block_mask: BlockMask,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    num_heads: int,
) -> Bool[Array, "b N T S"]:
    mask = jnp.asarray(block_mask.to_dense())
    mask = mask if mask.ndim == 4 else mask[None]
    mask = jnp.repeat(mask, num_heads // mask.shape[1], axis=1)
    if segment_ids is None:
        return mask
    query, key = segment_ids
    return mask & (query[:, None, :, None] == key[:, None, None, :])
