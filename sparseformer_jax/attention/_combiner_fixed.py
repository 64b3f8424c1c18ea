"""Combiner's fixed spans: the own block is direct, every other block is a span."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.attention import _combiner_cache
from sparseformer_jax.attention._combiner_cache import Kept
from sparseformer_jax.attention._combiner_parts import (
    Part,
    Setup,
    Tokens,
    attend_within,
    cut,
    masked,
    pad,
    per_head,
    pooled,
    read,
    summarise,
)
from sparseformer_jax.attention.inputs import Inputs

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
        *(query, per_head(spans.key, num_heads), spans.value, ids),
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


def shapes(num_tokens: int, span_size: int) -> dict[str, tuple[int, ...]]:
    """Returns what decoding keeps: keys and values of a block, and the pairs of those before.

    Of the block's queries their maximum is enough.
    """
    num_spans = (num_tokens - 1) // span_size
    return {
        "key": (span_size,),
        "value": (span_size,),
        "pooled_query": (min(num_spans, 1),),
        "span_key": (num_spans,),
        "span_value": (num_spans,),
    }


def remember(
    prompt: Inputs, lengths: Int[Array, " B"], setup: Setup
) -> dict[str, Float[Array, "B _ _ H"]]:
    """Returns that of whole prompts."""
    size = setup.size
    tokens = Tokens(prompt.query, prompt.key, prompt.value)
    spans = summarise(cut(pad(tokens, size), size), setup)
    query, key, value = (_combiner_cache.open_tokens(x, lengths, size) for x in tokens[:3])
    is_open = _combiner_cache.is_open(lengths, size)
    return {
        "key": key,
        "value": value,
        "pooled_query": pooled(setup.pool_query(query)[:, None], is_open[:, None]),
        "span_key": _combiner_cache.first(spans.key, lengths // size),
        "span_value": _combiner_cache.first(spans.value, lengths // size),
    }


def step(token: Inputs, kept: Kept, setup: Setup) -> tuple[list[Part], Kept]:
    """Returns attention of one token to its block and to the spans before, and what it leaves."""
    span, place = jnp.divmod(kept.position, setup.size)
    kept = kept.put("key", (place,), token.key[:, 0]).put("value", (place,), token.value[:, 0])
    attended = [(kept["key"], kept["value"], jnp.arange(setup.size) <= place[:, None])]
    if "span_key" in kept:
        kept = _end_span(token.query, kept, span, place, setup)
        spans = kept["span_key"], kept["span_value"]
        attended.append((*spans, jnp.arange(spans[0].shape[1]) < span[:, None]))
    return [_combiner_cache.attend(token.query, *each, setup) for each in attended], kept


def _end_span(
    query: Float[Array, "B 1 N H"],
    kept: Kept,
    span: Int[Array, " B"],
    place: Int[Array, " B"],
    setup: Setup,
) -> Kept:
    """Adds the token to its span, and makes the pair of one that is over."""
    pooled_query = jnp.maximum(setup.pool_query(query), kept["pooled_query"])
    pooled_query = _combiner_cache.chosen(place == 0, setup.pool_query(query), pooled_query)
    is_over = place == setup.size - 1
    kept = kept.put("pooled_query", (0,), pooled_query[:, 0])

    def pair() -> tuple[jax.Array, jax.Array]:
        block = Tokens(None, kept["key"][:, None], kept["value"][:, None])
        key = pooled(setup.pool_key(block.key), None)
        return key, read(kept["pooled_query"], block, None, setup).output

    key, value = _combiner_cache.where_any(is_over, pair)
    kept = kept.put("span_key", (span,), key[:, 0], is_over)
    return kept.put("span_value", (span,), value[:, 0], is_over)
