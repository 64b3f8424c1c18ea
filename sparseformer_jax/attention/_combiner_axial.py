"""Combiner over a grid: the sequence in rows, read along rows and down columns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.attention._combiner_parts import (
    Part,
    Setup,
    Spans,
    Tokens,
    attend_within,
    cut,
    in_last_document,
)

# Documents of the cells of queries and of keys.
GridIds = tuple[Int[Array, "B R W"], Int[Array, "B S W"]]


def parts(
    tokens: Tokens, keyed: Tokens, setup: Setup, row_key: Callable[[jax.Array], jax.Array]
) -> list[Part]:
    """Returns direct attention inside the own row, and attention to other rows.

    Args:
      tokens: of the grid.
      keyed: the same, with the values that the pairs' keys are made of.
      setup: of the variant.
      row_key: makes those keys of what a row's tokens read in it, [B, T, N, H].
    """
    is_causal, num_tokens = setup.config.is_causal, tokens.query.shape[1] * setup.num_shards
    value = attend_within(tokens, setup, is_causal=False)
    direct = attend_within(tokens, setup, is_causal=True) if is_causal else value
    if num_tokens == setup.size and not setup.options.count_own_span:
        return [direct]
    of_keys = value if keyed is tokens else attend_within(keyed, setup, is_causal=False)
    pairs = tokens._replace(key=row_key(of_keys.output), value=value.output)
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
