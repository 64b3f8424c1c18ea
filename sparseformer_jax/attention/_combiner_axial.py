"""Combiner over a grid: the sequence in rows, read along rows and down columns."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax.attention import _combiner_cache
from sparseformer_jax.attention._combiner_cache import Kept
from sparseformer_jax.attention._combiner_parts import (
    Part,
    Setup,
    Spans,
    Tokens,
    attend_within,
    cut,
    in_last_document,
    pad,
)
from sparseformer_jax.attention.inputs import Inputs

# Documents of the cells of queries and of keys.
GridIds = tuple[Int[Array, "B R W"], Int[Array, "B S W"]]


def parts(
    tokens: Tokens,
    keyed: Tokens,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    setup: Setup,
) -> list[Part]:
    """Returns direct attention inside the own row, and attention to other rows.

    Args:
      tokens: of the grid.
      keyed: the same, with the values that the pairs' keys are made of.
      x: what those are made of beside.
      positions: of the tokens in their documents.
      setup: of the variant.
    """
    is_causal, num_tokens = setup.config.is_causal, tokens.query.shape[1] * setup.num_shards
    value = attend_within(tokens, setup, is_causal=False)
    direct = attend_within(tokens, setup, is_causal=True) if is_causal else value
    if num_tokens == setup.size and not setup.options.count_own_span:
        return [direct]
    of_keys = value if keyed is tokens else attend_within(keyed, setup, is_causal=False)
    key = setup.row_key(of_keys.output, x, positions)
    pairs = tokens._replace(key=key, value=value.output)
    return [direct, *setup.both_ways(_earlier_rows, pairs)]


def _earlier_rows(tokens: Tokens, setup: Setup, with_own: bool) -> list[Part]:
    """Attention down each column to the pairs of earlier rows.

    In columns before a row's last document its first token takes the place of the one there,
    which belongs to others.
    """
    grid = cut(tokens, setup.size)  # [B, R, W, ..]
    spans, ids = Spans(grid.key, grid.value, None), None
    if tokens.ids is not None:
        is_last = in_last_document(grid.ids)
        first = jnp.argmax(is_last, axis=2)[..., None, None, None]

        def moved(x: jax.Array) -> jax.Array:
            return jnp.where(is_last[..., None, None], x, jnp.take_along_axis(x, first, axis=2))

        last = jnp.broadcast_to(grid.ids[..., -1:], grid.ids.shape)
        spans = Spans(moved(grid.key), moved(grid.value), last)
    spans = setup.gather(spans)
    if spans.ids is not None:
        ids = (grid.ids, spans.ids)
    offset = setup.first(tokens.query.shape[1]) // setup.size - (not with_own)
    return [attend_down(grid.query, spans.key, spans.value, ids, offset, setup)]


def attend_down(
    query: Float[Array, "B R W N H"],
    key: Float[Array, "B S W K H"],
    value: Float[Array, "B S W K H"],
    ids: GridIds | None,
    offset: Any,
    setup: Setup,
) -> Part:
    """Attention in each column to the rows j <= i + offset."""

    def columns(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(-1, x.shape[1], *x.shape[3:])

    batch, rows, width = query.shape[:3]

    def tokens(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, width, rows, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(batch, rows * width, *x.shape[3:])

    query, key, value, pair = jax.tree.map(columns, (query, key, value, ids))
    return jax.tree.map(tokens, setup.attend(query, key, value, pair, offset=offset))


def num_pairs(num_tokens: int, size: int, is_causal: bool, count_own_span: bool) -> int:
    """Returns the pairs that are visited: direct, to spans and inside their rows."""
    whole, rest = divmod(num_tokens, size)
    rows = whole + (rest > 0)
    inside = whole * size**2 + rest**2
    if not is_causal:
        return inside + num_tokens * (rows - 1 + count_own_span)
    direct = (inside + num_tokens) // 2
    earlier = size * whole * (whole - 1) // 2 + rest * whole
    return direct + earlier + (inside if rows > 1 else 0)


def shapes(num_tokens: int, span_size: int) -> dict[str, tuple[int, ...]]:
    """Returns what decoding keeps: all of the open row, and the pairs of those before.

    Whole rows are read by each of their queries.
    """
    pairs = ((num_tokens - 1) // span_size, span_size)
    of_tokens = dict.fromkeys(("query", "key", "value", "x"), (span_size,))
    return {**of_tokens, "row_key": pairs, "row_value": pairs}


def remember(
    prompt: Inputs, lengths: Int[Array, " B"], setup: Setup
) -> dict[str, Float[Array, "..."]]:
    """Returns that of whole prompts."""
    size = setup.size
    arrays = {"query": prompt.query, "key": prompt.key, "value": prompt.value, "x": prompt.x}
    tokens = pad(Tokens(prompt.query, prompt.key, prompt.value), size)
    value = attend_within(tokens, setup, is_causal=False).output
    key = setup.row_key(value, *pad((prompt.x, prompt.positions[0]), size))
    rows = (_combiner_cache.first(x, lengths // size) for x in cut((key, value), size))
    opened = {name: _combiner_cache.open_tokens(x, lengths, size) for name, x in arrays.items()}
    return {**opened, **dict(zip(("row_key", "row_value"), rows, strict=True))}


def step(token: Inputs, kept: Kept, setup: Setup) -> tuple[list[Part], Kept]:
    """Returns attention of one token to its row and down its column, and what it leaves."""
    size = setup.size
    row, place = jnp.divmod(kept.position, size)
    for name in ("query", "key", "value", "x"):
        kept = kept.put(name, (place,), getattr(token, name)[:, 0])
    attended = [(kept["key"], kept["value"], jnp.arange(size) <= place[:, None])]
    if "row_key" in kept:
        kept = _end_row(kept, row, place == size - 1, setup)
        key, value = (kept.at(name, slice(None), place) for name in ("row_key", "row_value"))
        attended.append((key, value, jnp.arange(key.shape[1]) < row[:, None]))
    return [_combiner_cache.attend(token.query, *each, setup) for each in attended], kept


def _end_row(kept: Kept, row: Int[Array, " B"], is_over: Bool[Array, " B"], setup: Setup) -> Kept:
    """Makes the pairs of a row that is over."""

    def pairs() -> tuple[jax.Array, jax.Array]:
        tokens = Tokens(kept["query"], kept["key"], kept["value"])
        positions = (row * setup.size)[:, None] + jnp.arange(setup.size)
        value = attend_within(tokens, setup, is_causal=False).output
        return setup.row_key(value, kept["x"], positions), value

    key, value = _combiner_cache.where_any(is_over, pairs)
    return kept.put("row_key", (row,), key, is_over).put("row_value", (row,), value, is_over)
