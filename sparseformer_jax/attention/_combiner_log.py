"""Combiner's log-sparse spans: the past, tiled by the binary digits of the position.

Where digit l of a position is set, the 2^l tokens before the position's multiple of 2^l are
a span: the left half of an aligned block of 2^(l + 1) tokens, whose right half it lies in.

Digits are taken a few at a time. Spans of `_DIGITS` of them lie in one block, as runs of its
2^_DIGITS equal children, and are read and attended to by dense products with static masks:
a few times more pairs than a query sees, and many times faster than reading each pair alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import precision
from sparseformer_jax.attention import _combiner_cache
from sparseformer_jax.attention._combiner_cache import Kept
from sparseformer_jax.attention._combiner_parts import (
    Part,
    Setup,
    Tokens,
    cut,
    pad,
    per_head,
    pooled,
    read,
    single,
    softmax,
)
from sparseformer_jax.attention.inputs import Inputs

_DIGITS = 4


def attend(
    tokens: Tokens, setup: Setup, merging: Callable[[list[Part], Any], jax.Array]
) -> Float[Array, "B T N _"]:
    """Returns attention to the token itself, and to one span for each digit, `merging` its parts.

    Heads are rows of the batch, so that no product moves them.
    """
    batch, num_tokens, num_heads, _ = tokens.query.shape

    def fold(x: jax.Array) -> jax.Array:
        return per_head(x, num_heads).swapaxes(1, 2).reshape(-1, num_tokens, 1, x.shape[-1])

    ids = None if tokens.ids is None else jnp.repeat(tokens.ids, num_heads, axis=0)
    query, key, value = map(fold, tokens[:3])
    tokens = Tokens(query, key, value, ids)
    own = single(query, key, value, None, setup)
    output = merging([own, *setup.both_ways(_spans, tokens)], query.dtype)
    return output.reshape(batch, num_heads, num_tokens, -1).swapaxes(1, 2)


class _Maxima(NamedTuple):
    """Of runs of tokens, each of its last document: keys and queries [B, R, 1, H], ids [B, R]."""

    key: Any
    query: Any
    ids: Any


def _spans(tokens: Tokens, setup: Setup, with_own: bool) -> list[Part]:
    del with_own  # a token is in none of its spans
    one = _Maxima(setup.pool_key(tokens.key), setup.pool_query(tokens.query), tokens.ids)
    levels = _levels(one, (tokens.query.shape[1] - 1).bit_length())
    whole = levels.pop()
    # One token is its own key.
    levels[:1] = [level._replace(key=tokens.key) for level in levels[:1]]
    found = [
        _inside_blocks(tokens, levels[digit : digit + _DIGITS], setup, 2**digit)
        for digit in range(0, len(levels), _DIGITS)
    ]
    digits = (setup.num_shards - 1).bit_length()
    if digits == 0:
        return found
    shards = _levels(setup.gather(whole), digits)[:-1]
    return found + [_digit_of_shards(tokens, *each, setup) for each in enumerate(shards)]


def _levels(runs: _Maxima, digits: int) -> list[_Maxima]:
    """Returns the maxima of 1, 2, 4 .. 2^digits runs."""
    levels = [runs]
    for _ in range(digits):
        pairs = cut(pad(levels[-1], 2), 2)
        left, right = _half(pairs, 0), _half(pairs, 1)

        # Where the right half is all of another document, the left one has nothing of it.
        def combined(x: jax.Array, y: jax.Array) -> jax.Array:
            if runs.ids is None:
                return jnp.maximum(x, y)
            same = (left.ids == right.ids)[..., None, None]  # noqa: B023
            return jnp.where(same, jnp.maximum(x, y), y)

        key, query = combined(left.key, right.key), combined(left.query, right.query)
        levels.append(_Maxima(key, query, right.ids))
    return levels


def _half(pairs: Any, half: int) -> Any:
    return jax.tree.map(lambda x: x[:, :, half], pairs)


def _inside_blocks(tokens: Tokens, levels: list[_Maxima], setup: Setup, child: int) -> Part:
    """Attention to the spans of some digits.

    Args:
      tokens: of the sequence.
      levels: maxima of runs of child, 2 child .. tokens.
      setup: of the variant.
      child: tokens that the static masks take as one.
    """
    num_tokens = tokens.query.shape[1]
    dtype = jnp.promote_types(tokens.query.dtype, jnp.float32)
    count = 2 ** len(levels)
    size = child * count
    blocks: Tokens = cut(pad(tokens, size), size)
    query, key, value = (x[..., 0, :].astype(dtype) for x in blocks[:3])  # [B, G, size, H]
    lefts = []
    for digit, level in enumerate(levels):
        runs = count >> digit
        pairs = jax.tree.map(
            lambda x: x.reshape(*x.shape[:2], -1, 2, *x.shape[3:])[:, :, :, 0],
            cut(pad(level, runs), runs),
        )
        lefts.append(pairs)
    spans: _Maxima = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *lefts)
    far_key, far_query = (x[..., 0, :].astype(dtype) for x in spans[:2])
    is_read, is_seen = (jnp.asarray(np.repeat(mask, child, 0)) for mask in _halves(len(levels)))
    if blocks.ids is not None:
        same = blocks.ids[..., None] == spans.ids[:, :, None]  # [B, G, size, spans]
        is_read, is_seen = is_read & same, is_seen & same
    read, _ = _dense(far_query, key, value, is_read.swapaxes(-1, -2), setup)
    output, lse = _dense(query, far_key, read, is_seen, setup)
    output = output.reshape(len(output), -1, 1, output.shape[-1])
    return Part(output[:, :num_tokens], lse.reshape(len(lse), -1, 1)[:, :num_tokens])


def _halves(digits: int) -> tuple[Bool[np.ndarray, "C R"], Bool[np.ndarray, "C R"]]:
    """Returns which children of a block are in each left half, and which in the right one."""
    number, left, right = np.arange(2**digits), [], []
    for digit in range(digits):
        is_own = number[:, None] >> (digit + 1) == np.arange(2 ** (digits - digit - 1))
        is_right = (number >> digit & 1 == 1)[:, None]
        left.append(is_own & ~is_right)
        right.append(is_own & is_right)
    return np.concatenate(left, axis=1), np.concatenate(right, axis=1)


def _dense(
    query: Float[Array, "B G T H"],
    key: Float[Array, "B G S H"],
    value: Float[Array, "B G S H"],
    mask: Bool[Array, "..."],
    setup: Setup,
) -> tuple[Float[Array, "B G T H"], Float[Array, "B G T"]]:
    """Returns masked attention and its lse; 0 and -inf where nothing is seen."""
    exact = precision.exact(query.dtype)
    logits = setup.scores.logits(jnp.einsum("bgth,bgsh->bgts", query, key, precision=exact))
    weights, lse = softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bgts,bgsh->bgth", weights, value, precision=exact), lse


def _digit_of_shards(tokens: Tokens, digit: int, spans: _Maxima, setup: Setup) -> Part:
    """The same for spans of 2^digit shards, which tell what they read of theirs.

    With the maxima that is N (3 H + 1) numbers a shard, whatever its length.
    """
    num_tokens = tokens.query.shape[1]
    width, shard = 2**digit, setup.first(num_tokens) // num_tokens
    own, left = shard >> digit, shard >> (digit + 1) << 1  # spans of so many shards
    block: Tokens = jax.tree.map(lambda x: x[:, None], tokens)

    def number(span: Any, arrays: Any) -> Any:
        def taken(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, span, 1, axis=1)

        return jax.tree.map(taken, arrays)

    mine: _Maxima = number(own, spans)
    visible = None if mine.ids is None else block.ids == mine.ids[..., None]
    told: Part = setup.gather(read(mine.query, block, visible, setup))
    told = cut(pad(told, width), width)
    share = jax.nn.softmax(told.lse, axis=2)[..., None]
    value = number(left, jnp.sum(share * told.output, axis=2))
    before: _Maxima = number(left, spans)
    seen = jnp.broadcast_to((shard >> digit) % 2 == 1, tokens.query.shape[:2])
    if before.ids is not None:
        seen &= tokens.ids == before.ids
    return single(tokens.query, before.key, value, seen, setup)


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


def shapes(num_tokens: int, span_size: int) -> dict[str, tuple[int, ...]]:
    """Returns what decoding keeps: a span a digit, and the tokens of which spans are to come.

    These are at most as many as the longest span has, at least half of the sequence: a span is
    read when it ends, by a query that is not known before.
    """
    del span_size
    digits = (num_tokens - 1).bit_length()
    tokens = (2 ** max(0, digits - 1),)
    of_digits = ("pooled_query", "pooled_key", "span_key", "span_value")
    return {"key": tokens, "value": tokens, **dict.fromkeys(of_digits, (digits,))}


def remember(
    prompt: Inputs, lengths: Int[Array, " B"], setup: Setup
) -> dict[str, Float[Array, "..."]]:
    """Returns that of whole prompts."""
    num_tokens, size = prompt.query.shape[1], setup.size
    rows, last = jnp.arange(len(lengths))[:, None], (lengths - 1)[:, None]
    places = last - (last - jnp.arange(size)) % size  # the last of each, modulo size
    spans = []
    for digit in range((2 * size - 1).bit_length()):
        start = lengths >> (digit + 1) << (digit + 1)
        index = start[:, None] + jnp.arange(min(2**digit, num_tokens))
        visible = (index < lengths[:, None])[:, None]
        index = jnp.minimum(index, num_tokens - 1)
        block = Tokens(*(x[rows, index][:, None] for x in (prompt.query, prompt.key, prompt.value)))
        key = pooled(block.key if digit == 0 else setup.pool_key(block.key), visible)
        query = pooled(setup.pool_query(block.query), visible)
        has_any = jnp.any(visible, axis=2)
        key, query = (_combiner_cache.chosen(has_any, x, 0) for x in (key, query))
        spans.append((query, key, read(query, block, visible, setup).output))
    query, key, value = (jnp.concatenate(each, axis=1) for each in zip(*spans, strict=True))
    own_key, own_value = (
        _combiner_cache.chosen(places >= 0, x[rows, jnp.maximum(places, 0)], 0)
        for x in (prompt.key, prompt.value)
    )
    return {
        "key": own_key,
        "value": own_value,
        "pooled_query": query,
        "pooled_key": key,
        "span_key": key,
        "span_value": value,
    }


def step(token: Inputs, kept: Kept, setup: Setup) -> tuple[list[Part], Kept]:
    """Returns attention of one token to itself and a span for each digit, and what it leaves."""
    place = (kept.position % setup.size,)
    kept = kept.put("key", place, token.key[:, 0]).put("value", place, token.value[:, 0])
    num_heads = token.query.shape[2]
    key, value = (per_head(x, num_heads) for x in (token.key, token.value))
    own = single(token.query, key, value, None, setup)
    if "span_key" not in kept:
        return [own], kept
    digits = jnp.arange(kept.cache["span_key"].shape[2])
    kept = _end_spans(token, kept, digits, setup)
    is_set = (kept.position[:, None] >> digits & 1) == 1
    far = _combiner_cache.attend(token.query, kept["span_key"], kept["span_value"], is_set, setup)
    return [own, far], kept


def _end_spans(token: Inputs, kept: Kept, digits: Int[Array, " L"], setup: Setup) -> Kept:
    """Adds the token to what is pooled of each digit, and makes the pairs of spans that are over.

    Of a token that is no part of a digit's span it does the same; nothing reads that.
    """
    place = kept.position[:, None] & ((2 << digits) - 1)  # in the block of the span
    # One token is its own key.
    key = jnp.where(digits[:, None, None] == 0, token.key, setup.pool_key(token.key))
    for name, x in (("pooled_query", setup.pool_query(token.query)), ("pooled_key", key)):
        pooled = _combiner_cache.chosen(place == 0, x, jnp.maximum(x, kept[name]))
        kept = kept.put(name, (), pooled)

    def value(digit: int) -> jax.Array:
        start = kept.position & -(2**digit)
        places = (start[:, None] + jnp.arange(2**digit)) % setup.size
        key, value = (kept.at(name, places)[:, None] for name in ("key", "value"))
        query = kept["pooled_query"][:, digit : digit + 1]
        return read(query, Tokens(None, key, value), None, setup).output

    for digit in range(len(digits)):
        is_over = place[:, digit] == 2**digit - 1
        found = _combiner_cache.where_any(is_over, functools.partial(value, digit))
        kept = kept.put("span_key", (digit,), kept["pooled_key"][:, digit], is_over)
        kept = kept.put("span_value", (digit,), found[:, 0], is_over)
    return kept
