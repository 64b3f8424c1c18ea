"""Attention of one query a sequence, as in decoding: chunk by chunk of keys, without tiles."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.rules import Rule
from sparseformer_jax.model.layers import soft_cap

# Keys and values [B, C, K, H] of a chunk, and which of them each pattern head keeps [B, P, C].
Chunk = tuple[Float[Array, "B C K H"], Float[Array, "B C K H"], Bool[Array, "B P C"]]
# Chunks by number, and how many there are, which may be known only when this runs.
Part = tuple[Callable[[Any], Chunk], int | Int[Array, ""]]


def visible(
    rule: Rule,
    pattern_heads: Int[Array, " P"],
    queries: Int[Array, " B"],
    keys: Int[Array, "B P C"],
    window_size: int | None,
) -> Bool[Array, "B P C"]:
    """Returns which keys causal queries see by their positions; one below 0 is of no token."""
    size, query = rule.block_size or 1, queries[:, None, None]
    kept = (0 <= keys) & (keys <= query)
    kept = kept & rule.visible(pattern_heads[:, None], query // size, keys // size)
    return kept if window_size is None else kept & (query - keys < window_size)


def attend(
    query: Float[Array, "B 1 N H"],
    parts: Sequence[Part],
    scale: float,
    cap: float | None,
) -> Float[Array, "B 1 N H"]:
    """Returns the attended values, by a softmax that adds up over chunks.

        m' = max(m, max_j s_j),  l' = e^(m - m') l + sum_j e^(s_j - m'),  o' likewise,  o / l

    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv 1805.02867.

    Args:
      query: one of each sequence.
      parts: the keys, each in one chunk of one part.
      scale: of the scores.
      cap: of the scores; None: none.
    """
    batch, _, num_heads, head_dim = query.shape
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}

    def add(chunk: Chunk, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        (key, value, kept), (highest, total, output) = chunk, sums
        grouped = query.reshape(batch, key.shape[2], -1, head_dim)
        scores = soft_cap(scale * jnp.einsum("bkgh,bskh->bkgs", grouped, key, **exact), cap)
        scores = scores.reshape(batch, num_heads, -1)
        mask = jnp.repeat(kept, num_heads // kept.shape[1], axis=1)
        scores = jnp.where(mask, scores, -jnp.inf)
        top = jnp.maximum(highest, jnp.max(scores, axis=-1))
        # Where nothing is seen yet both are -inf.
        shrink = jnp.where(highest == top, 1.0, jnp.exp(highest - top))
        weights = jnp.where(mask, jnp.exp(scores - top[..., None]), 0.0)
        cast = weights.astype(value.dtype).reshape(*grouped.shape[:3], -1)
        added = jnp.einsum("bkgs,bskh->bkgh", cast, value, **exact)
        output = shrink[..., None] * output + added.reshape(output.shape)
        return top, shrink * total + jnp.sum(weights, axis=-1), output

    sums = (
        jnp.full((batch, num_heads), -jnp.inf, jnp.float32),
        jnp.zeros((batch, num_heads), jnp.float32),
        jnp.zeros((batch, num_heads, head_dim), jnp.float32),
    )
    for chunk, num_chunks in parts:
        sums = jax.lax.fori_loop(0, num_chunks, lambda i, s, c=chunk: add(c(i), s), sums)
    _, total, output = sums
    # At least 1 where something is seen; a row whose token does not count may see nothing.
    output = output / jnp.maximum(total, 1.0)[..., None]
    return output.reshape(query.shape).astype(query.dtype)
