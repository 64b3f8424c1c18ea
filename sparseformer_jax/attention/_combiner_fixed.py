"""Combiner's fixed spans: the own block is direct, every other block is a span."""

import jax
import jax.numpy as jnp

from sparseformer_jax.attention._combiner_parts import (
    Part,
    Setup,
    Tokens,
    attend_within,
    cut,
    masked,
    summarise,
)

# Queries that read a tile of spans together.
_QUERIES_IN_A_TILE = 512


def parts(tokens: Tokens, setup: Setup) -> list[Part]:
    """Returns direct attention inside the own block, and attention to spans."""
    direct = attend_within(tokens, setup, is_causal=setup.config.is_causal)
    return [direct, *setup.both_ways(_earlier_spans, tokens)]


def _earlier_spans(tokens: Tokens, setup: Setup, with_own: bool) -> list[Part]:
    """Attention to the spans of earlier blocks.

    The queries of a block see the same spans: they are heads of one query whose position is
    the block's number. Of those in other documents than the block's first none goes back
    past the block.
    """
    batch, num_tokens, num_heads, head_dim = tokens.query.shape
    size = setup.size
    num_blocks = num_tokens // size
    if num_blocks * setup.num_shards == 1 and not with_own:
        return []
    blocks = cut(tokens, size)
    spans = setup.gather(summarise(blocks, setup))
    query = blocks.query.swapaxes(2, 3).reshape(batch, num_blocks, -1, head_dim)
    ids = None if tokens.ids is None else (blocks.ids[:, :, 0], spans.ids)
    part = setup.attend(
        *(query, spans.key, spans.value, ids),
        offset=setup.first(num_tokens) // size - (not with_own),
        query_tile=min(num_blocks, max(1, _QUERIES_IN_A_TILE // size)),
    )

    def unfold(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, num_blocks, num_heads, size, *x.shape[3:])
        return x.swapaxes(2, 3).reshape(batch, num_tokens, num_heads, *x.shape[4:])

    part = jax.tree.map(unfold, part)
    if ids is None:
        return [part]
    return [masked(part, tokens.ids == jnp.repeat(blocks.ids[:, :, 0], size, axis=1))]


def num_pairs(num_tokens: int, size: int, is_causal: bool, count_own_span: bool) -> int:
    """Returns the pairs that are visited: direct, to spans and inside summaries."""
    whole, rest = divmod(num_tokens, size)
    blocks = whole + (rest > 0)
    summaries = num_tokens if size > 1 and blocks > 1 else 0
    earlier = size * whole * (whole - 1) // 2 + rest * whole
    if is_causal:
        direct = whole * size * (size + 1) // 2 + rest * (rest + 1) // 2
        return direct + earlier + summaries
    own = num_tokens * (1 + (size > 1 and blocks == 1)) if count_own_span else 0
    return whole * size**2 + rest**2 + num_tokens * (blocks - 1) + 2 * summaries + own
