"""Combiner's log-sparse spans: the past, tiled by the binary digits of the position.

Where digit l of a position is set, the 2^l tokens before the position's multiple of 2^l are
a span: the left half of an aligned block of 2^(l + 1) tokens, whose right half it lies in.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparseformer_jax.attention._combiner_parts import (
    Part,
    Setup,
    Spans,
    Tokens,
    cut,
    in_last_document,
    pad,
    per_head,
    pooled,
    read,
    single,
    summarise,
)


def parts(tokens: Tokens, setup: Setup) -> list[Part]:
    """Returns attention to the token itself, and to one span for each digit."""
    key, value = (per_head(x, tokens.query.shape[2]) for x in (tokens.key, tokens.value))
    own = single(tokens.query, key, value, None, setup)
    return [own, *setup.both_ways(_spans, tokens)]


def _spans(tokens: Tokens, setup: Setup, with_own: bool) -> list[Part]:
    del with_own  # a token is in none of its spans
    digits = (tokens.query.shape[1] - 1).bit_length()
    inside = [_digit(tokens, setup, digit) for digit in range(digits)]
    digits = (setup.num_shards - 1).bit_length()
    return inside + [_digit_of_shards(tokens, setup, digit) for digit in range(digits)]


def _digit(tokens: Tokens, setup: Setup, digit: int) -> Part:
    """Attention of right halves to the summary of the left ones."""
    num_tokens, size = tokens.query.shape[1], 2**digit
    halves = cut(cut(pad(tokens, 2 * size), size), 2)  # [B, G, 2, size, ..]
    left: Tokens = jax.tree.map(lambda x: x[:, :, 0], halves)
    right: Tokens = jax.tree.map(lambda x: x[:, :, 1], halves)
    if size == 1:  # one token is its own key
        setup = dataclasses.replace(setup, pool_key=lambda x: x)
    spans = summarise(left, setup)
    seen = None if spans.ids is None else right.ids == spans.ids[..., None]
    part = single(right.query, spans.key[:, :, None], spans.value[:, :, None], seen, setup)

    def behind(x: jax.Array, fill: Any) -> jax.Array:
        widths = [(0, 0), (0, 0), (size, 0)] + [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_tokens]

    return Part(behind(part.output, 0), behind(part.lse, -jnp.inf))


def _digit_of_shards(tokens: Tokens, setup: Setup, digit: int) -> Part:
    """The same for spans of 2^digit shards: each tells its maxima, then what it reads.

    That is N (3 H + 1) numbers a shard, whatever its length.
    """
    num_tokens, num_heads = tokens.query.shape[1:3]
    width, shard = 2**digit, setup.first(num_tokens) // num_tokens
    own, left = shard >> digit, shard >> (digit + 1) << 1  # spans of so many shards
    block: Tokens = jax.tree.map(lambda x: x[:, None], tokens)
    visible = None if block.ids is None else in_last_document(block.ids)
    maxima = Spans(
        per_head(pooled(setup.pool_key(block.key), visible), num_heads),
        pooled(setup.pool_query(block.query), visible),
        None if block.ids is None else block.ids[..., -1],
    )
    shards: Spans = cut(pad(setup.gather(maxima), 2 * width), width)  # [B, spans, width, ..]
    visible = None if shards.ids is None else in_last_document(shards.ids)
    spans = Spans(
        pooled(shards.key, visible),
        pooled(shards.value, visible),
        None if shards.ids is None else shards.ids[..., -1],
    )

    def number(span: Any) -> Spans:
        def taken(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, span, 1, axis=1)

        return jax.tree.map(taken, spans)

    mine, seen = number(own), jnp.broadcast_to((shard >> digit) % 2 == 1, tokens.query.shape[:2])
    visible = None if mine.ids is None else block.ids == mine.ids[..., None]
    told: Part = setup.gather(read(mine.value, block, visible, setup))
    told = cut(pad(told, 2 * width), width)
    share = jax.nn.softmax(told.lse, axis=2)[..., None]
    spans = spans._replace(value=jnp.sum(share * told.output, axis=2))
    before = number(left)
    if before.ids is not None:
        seen &= tokens.ids == before.ids
    return single(tokens.query, before.key, before.value, seen, setup)


def num_pairs(num_tokens: int, is_causal: bool) -> int:
    """Returns the pairs that are visited: direct, to spans and inside summaries."""
    past = 0
    for digit in range((num_tokens - 1).bit_length()):
        size = 2**digit
        whole, rest = divmod(num_tokens, 2 * size)
        right = whole * size + max(0, rest - size)
        left = (whole + (rest > size)) * size
        past += right + (left if size > 1 else 0)
    return num_tokens + past * (1 if is_causal else 2)
