"""Attention of one query a sequence, as in decoding: one pass over its keys, without tiles."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.rules import Rule
from sparseformer_jax.attention.inputs import SegmentIds
from sparseformer_jax.model.layers import soft_cap


def visible(
    rule: Rule,
    pattern_heads: Int[Array, " P"],
    position: Int[Array, ""],
    num_keys: int,
    window_size: int | None,
) -> Bool[Array, "P S"]:
    """Returns which of the keys up to a causal query's position its pattern has, by head."""
    keys, size = jnp.arange(num_keys), rule.block_size or 1
    kept = rule.visible(pattern_heads[:, None], position // size, keys // size)
    kept = kept & (keys <= position)
    if window_size is not None:
        kept = kept & (position - keys < window_size)
    return jnp.broadcast_to(kept, (len(pattern_heads), num_keys))


def attend(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    kept: Bool[Array, "P S"],
    segment_ids: SegmentIds | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "B 1 N H"]:
    """Returns the attended values; every query sees itself, so no row of weights is empty."""
    batch, _, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}
    scores = soft_cap(scale * jnp.einsum("bkgh,bskh->bkgs", grouped, key, **exact), cap)
    mask = jnp.repeat(kept, num_heads // len(kept), axis=0)[None]
    if segment_ids is not None:
        of_query, of_keys = segment_ids
        mask = mask & (of_query == of_keys)[:, None]
    scores = jnp.where(mask.reshape(-1, *scores.shape[1:]), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    output = jnp.einsum("bkgs,bskh->bkgh", weights, value, **exact)
    return output.reshape(query.shape).astype(query.dtype)
