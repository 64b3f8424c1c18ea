"""Combiner's axial mixture: parts of the other rows and columns of a grid are spans.

A token of row r and column c attends directly along both. Spans are, of every other column,
the cells above r; of every row above, the cells left of c, and those right of c. So a cell
off the own cross is covered twice, as in the released code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax.attention import _combiner_cache
from sparseformer_jax.attention._combiner_axial import GridIds, attend_down
from sparseformer_jax.attention._combiner_cache import Kept
from sparseformer_jax.attention._combiner_parts import (
    NO_DOCUMENT,
    Part,
    Setup,
    Spans,
    Tokens,
    attend_within,
    cut,
    pad,
    per_head,
)
from sparseformer_jax.attention.inputs import Inputs


def parts(tokens: Tokens, setup: Setup) -> list[Part]:
    """Returns direct attention in the own row, and all that lies in other rows."""
    direct = attend_within(tokens, setup, is_causal=setup.config.is_causal)
    return [direct, *setup.both_ways(_earlier_cells, tokens)]


def _earlier_cells(tokens: Tokens, setup: Setup, with_own: bool) -> list[Part]:
    """Attention to the own column above, and to spans of columns and of earlier rows.

    Every span is read by pooled queries of its own, so a device needs all keys and values.
    """
    grid: Tokens = cut(tokens, setup.size)
    whole: Tokens = cut(setup.gather(tokens), setup.size)
    row = setup.first(tokens.query.shape[1]) // setup.size
    before = row - (not with_own)
    ids = None if grid.ids is None else (grid.ids, whole.ids)
    direct = attend_down(grid.query, whole.key, whole.value, ids, before, setup)
    columns = _columns(whole, row, grid.query.shape[1], setup)
    found = [direct, *_along_row(grid, columns, setup)]
    documents = _documents(grid)
    for is_right in (False, True):
        spans = setup.gather(_sides(grid, setup, is_right))
        pair = (documents, spans.ids)
        key = per_head(spans.key, grid.query.shape[3])
        found.append(attend_down(grid.query, key, spans.value, pair, before, setup))
    return found


def _columns(whole: Tokens, row: Any, num_rows: int, setup: Setup) -> Spans:
    """The pairs of cells above each row of this device, of its first document: [B, R, W, ..]."""
    ids, num_heads = whole.ids, whole.query.shape[3]

    def own(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, row, num_rows, axis=1)

    seen = jnp.arange(whole.query.shape[1])[None, :, None] > 0
    seen = jnp.broadcast_to(seen, whole.query.shape[:3])
    pair = None
    if ids is not None:
        above = jnp.pad(ids[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=NO_DOCUMENT)
        seen &= above == ids[:, :, :1]
        pair = (own(above), ids)
    query = _before(setup.pool_query(whole.query), seen, setup, axis=1, ids=ids)
    key = _before(setup.pool_key(whole.key), seen, setup, axis=1, ids=ids)
    query = own(query).astype(whole.query.dtype)
    part = attend_down(query, whole.key, whole.value, pair, row - 1, setup)
    value = cut(part.output, setup.size)
    if not setup.options.mask_empty:
        mean = jnp.mean(per_head(whole.value, num_heads), axis=1, keepdims=True)
        value, seen = jnp.where(own(seen)[..., None, None], value, mean), jnp.ones_like(seen)
    spans = jnp.where(seen, _documents(whole)[:, :, :1], NO_DOCUMENT)
    return Spans(own(per_head(key, num_heads)), value, own(spans))


def _along_row(grid: Tokens, columns: Spans, setup: Setup) -> list[Part]:
    """Attention of each row to the spans of the other columns, or of all as released."""

    def tokens(part: Part) -> Part:
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), part)

    ids = (_documents(grid), columns.ids)
    if setup.options.count_own_span:
        part = _attend_along(grid.query, columns.key, columns.value, ids, setup, is_causal=False)
        return [tokens(part)]
    left = _attend_along(grid.query, columns.key, columns.value, ids, setup)
    query, key, value, ids = jax.tree.map(_mirror, (grid.query, *columns[:2], ids))
    right = _attend_along(query, key, value, ids, setup)
    return [tokens(left), tokens(jax.tree.map(_mirror, right))]


def _sides(grid: Tokens, setup: Setup, is_right: bool) -> Spans:
    """The pairs of cells left of each cell in its row, or right, of the row's last document.

    Keys have as many heads as those of tokens.
    """
    if is_right:
        return jax.tree.map(_mirror, _left(jax.tree.map(_mirror, grid), grid, setup))
    return _left(grid, grid, setup)


def _left(grid: Tokens, unmirrored: Tokens, setup: Setup) -> Spans:
    num_heads = grid.query.shape[3]
    last = _documents(unmirrored)[:, :, -1:]
    documents = _documents(grid)
    is_last = documents == last
    seen = jnp.cumsum(is_last, axis=2) > is_last
    query = _before(setup.pool_query(grid.query), seen, setup, axis=2, where=is_last)
    key = _before(setup.pool_key(grid.key), seen, setup, axis=2, where=is_last)
    last = jnp.broadcast_to(last, documents.shape)
    pair = None if grid.ids is None else (last, grid.ids)
    query = query.astype(grid.query.dtype)
    value = _attend_along(query, grid.key, grid.value, pair, setup).output
    if not setup.options.mask_empty:
        mean = jnp.mean(per_head(grid.value, num_heads), axis=2, keepdims=True)
        value, seen = jnp.where(seen[..., None, None], value, mean), jnp.ones_like(seen)
    return Spans(key, value, jnp.where(seen, last, NO_DOCUMENT))


def _before(
    x: Float[Array, "B R W N H"],
    seen: Bool[Array, "B R W"],
    setup: Setup,
    *,
    axis: int,
    where: Bool[Array, "B R W"] | None = None,
    ids: Int[Array, "B R W"] | None = None,
) -> Float[Array, "B R W N H"]:
    """Pools what stands before each cell along an axis, in float32; 0 where nothing is seen.

    Args:
      x: cells.
      seen: where there is something.
      setup: says whether the pool is a maximum or a sum.
      axis: along which it runs.
      where: cells that count; None: all.
      ids: documents; the pool starts again with each.
    """
    is_sum = setup.options.mixture_pool == "sum"
    combine: Callable[..., jax.Array] = jnp.add if is_sum else jnp.maximum
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if where is not None:
        x = jnp.where(where[..., None, None], x, 0 if is_sum else -jnp.inf)

    def within(left: tuple[jax.Array, Any], right: tuple[jax.Array, Any]) -> Any:
        (x, before), (y, after) = left, right
        return jnp.where((before == after)[..., None, None], combine(x, y), y), after

    if ids is None:
        pooled = jax.lax.associative_scan(combine, x, axis=axis)
    else:
        pooled, _ = jax.lax.associative_scan(within, (x, ids), axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (1, 0)
    pooled = jax.lax.slice_in_dim(jnp.pad(pooled, widths), 0, x.shape[axis], axis=axis)
    return jnp.where(seen[..., None, None], pooled, 0)


def _attend_along(
    query: Float[Array, "B R W N H"],
    key: Float[Array, "B R W K H"],
    value: Float[Array, "B R W K H"],
    ids: GridIds | None,
    setup: Setup,
    *,
    is_causal: bool = True,
) -> Part:
    """Attention in each row to the cells left of each, or to all: [B, R, W, ..]."""
    shape = query.shape[:3]
    arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (query, key, value, ids))
    part = setup.attend(*arrays, is_causal=is_causal, offset=-1 if is_causal else 0)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), part)


def _documents(grid: Tokens) -> Int[Array, "B R W"]:
    return jnp.zeros(grid.query.shape[:3], jnp.int32) if grid.ids is None else grid.ids


def _mirror(x: jax.Array) -> jax.Array:
    return jnp.flip(x, axis=2)


def num_pairs(num_tokens: int, width: int, is_causal: bool, options: Any) -> int:
    """Returns the pairs that are visited: direct, to spans and inside summaries."""
    whole, rest = divmod(num_tokens, width)
    rows = np.array([width] * whole + [rest] * (rest > 0))
    inside = int((rows**2).sum())
    if is_causal:
        return (inside + num_tokens) // 2 + _earlier_pairs(rows, False, options)
    return inside + _earlier_pairs(rows, False, options) + _earlier_pairs(rows[::-1], True, options)


def _earlier_pairs(rows: Int[np.ndarray, "R"], with_own: bool, options: Any) -> int:
    """The pairs of `_earlier_cells` in rows of these lengths, all of which start a column."""
    count_own, keep_empty = options.count_own_span, not options.mask_empty
    above = np.arange(len(rows))
    cells = np.cumsum(rows) - rows  # in earlier rows
    column = np.minimum(rows * above, cells)
    height = np.append(0, np.maximum.accumulate(rows)[:-1])  # columns with a cell above
    width = rows.max() if keep_empty else height
    columns = rows * width - (0 if count_own else np.minimum(rows, width))
    sides = (rows - 1) * above + np.minimum(rows * above, cells - above)
    if keep_empty:
        sides = 2 * rows * above
    if count_own and with_own:
        column = column + rows
        sides = sides + 2 * (rows - (not keep_empty))
    read = np.minimum(rows * above, cells) + rows * (rows - 1)
    return int((column + columns + sides + read).sum())


def shapes(num_tokens: int, span_size: int) -> dict[str, tuple[int, ...]]:
    """Returns what decoding keeps: all keys and values, and the pairs of spans.

    Columns are direct, and with every row their spans grow, which new pooled queries read anew.
    """
    num_rows = -(-num_tokens // span_size)
    spans = num_rows > 1
    sides = ("left_key", "left_value", "right_key", "right_value")
    return {
        "query": (span_size,),
        "pooled_query": (spans * span_size,),
        **dict.fromkeys(("grid_key", "grid_value"), (num_rows, span_size)),
        **dict.fromkeys(sides, (num_rows - 1, span_size)),
        **dict.fromkeys(("column_key", "column_value"), (2 * spans, span_size)),
    }


def remember(
    prompt: Inputs, lengths: Int[Array, " B"], setup: Setup
) -> dict[str, Float[Array, "..."]]:
    """Returns that of whole prompts."""
    size, num_rows = setup.size, lengths // setup.size
    tokens = Tokens(prompt.query, prompt.key, prompt.value)
    grid: Tokens = cut(pad(tokens, size), size)
    own = [_combiner_cache.first(x, lengths) for x in (prompt.key, prompt.value)]
    grid_key, grid_value = cut(pad(own, size), size)
    is_above = (jnp.arange(grid.key.shape[1]) < num_rows[:, None])[..., None, None, None]

    def pooled(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if setup.options.mixture_pool == "sum":
            return jnp.sum(x, axis=1, where=is_above)
        highest = jnp.max(x, axis=1, where=is_above, initial=-jnp.inf)
        return _combiner_cache.chosen(num_rows > 0, highest, 0)

    query, key = pooled(setup.pool_query(grid.query)), pooled(setup.pool_key(grid.key))
    value = _read_columns(query, grid.key, grid.value, num_rows, setup)
    sides = _sides_kept(grid, setup)
    return {
        "query": _combiner_cache.open_tokens(prompt.query, lengths, size),
        "grid_key": grid_key,
        "grid_value": grid_value,
        **{name: _combiner_cache.first(x, num_rows) for name, x in sides.items()},
        "pooled_query": query,
        "column_key": jnp.stack([key, key], axis=1),
        "column_value": jnp.stack([value, value], axis=1),
    }


def step(token: Inputs, kept: Kept, setup: Setup) -> tuple[list[Part], Kept]:
    """Returns attention of one token along its row and column and to spans, and what it leaves."""
    size = setup.size
    row, place = jnp.divmod(kept.position, size)
    kept = kept.put("query", (place,), token.query[:, 0])
    kept = kept.put("grid_key", (row, place), token.key[:, 0])
    kept = kept.put("grid_value", (row, place), token.value[:, 0])
    own = kept.at("grid_key", row), kept.at("grid_value", row)
    attended = [(*own, jnp.arange(size) <= place[:, None])]
    if "left_key" in kept:
        kept = _end_row(kept, row, place == size - 1, setup)
        attended += _spans_of(kept, row, place, size)
    return [_combiner_cache.attend(token.query, *each, setup) for each in attended], kept


def _spans_of(
    kept: Kept, row: Int[Array, " B"], place: Int[Array, " B"], size: int
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Keys, values and which are seen: of the own column, of others, and of the sides of rows."""

    def column(name: str) -> jax.Array:
        return kept.at(name, slice(None), place)

    def above(name: str) -> jax.Array:
        return jnp.arange(kept.cache[name].shape[2]) < row[:, None]

    columns = kept.at("column_key", row % 2), kept.at("column_value", row % 2)
    is_other = (jnp.arange(size) != place[:, None]) & (row > 0)[:, None]
    has_left, has_right = (is_some[:, None] for is_some in (place > 0, place < size - 1))
    return [
        (column("grid_key"), column("grid_value"), above("grid_key")),
        (*columns, is_other),
        (column("left_key"), column("left_value"), above("left_key") & has_left),
        (column("right_key"), column("right_value"), above("right_key") & has_right),
    ]


def _end_row(kept: Kept, row: Int[Array, " B"], is_over: Bool[Array, " B"], setup: Setup) -> Kept:
    """Makes the pairs of a row that is over, and those of the columns down to it."""
    combine = jnp.add if setup.options.mixture_pool == "sum" else jnp.maximum

    def pool(before: jax.Array, x: jax.Array) -> jax.Array:
        return _combiner_cache.chosen(row == 0, x, combine(before, x))

    def pairs() -> dict[str, jax.Array]:
        tokens = Tokens(kept["query"], kept.at("grid_key", row), kept.at("grid_value", row))
        sides = _sides_kept(jax.tree.map(lambda x: x[:, None], tokens), setup)
        query = pool(kept["pooled_query"], setup.pool_query(tokens.query))
        cells = kept["grid_key"], kept["grid_value"]
        return {name: x[:, 0] for name, x in sides.items()} | {
            "pooled_query": query,
            "column_key": pool(kept.at("column_key", row % 2), setup.pool_key(tokens.key)),
            "column_value": _read_columns(query, *cells, row + 1, setup),
        }

    found = _combiner_cache.where_any(is_over, pairs)
    kept = kept.put("pooled_query", (), found["pooled_query"], is_over)
    for name in ("column_key", "column_value"):
        kept = kept.put(name, ((row + 1) % 2,), found[name], is_over)
    for name in ("left_key", "left_value", "right_key", "right_value"):
        kept = kept.put(name, (row,), found[name], is_over)
    return kept


def _sides_kept(grid: Tokens, setup: Setup) -> dict[str, Float[Array, "B R W _ H"]]:
    """The pairs of cells left and right of each cell in its row."""
    left, right = (_sides(grid, setup, is_right) for is_right in (False, True))
    return {
        "left_key": left.key,
        "left_value": left.value,
        "right_key": right.key,
        "right_value": right.value,
    }


def _read_columns(
    query: Float[Array, "B W N H"],
    key: Float[Array, "B R W K H"],
    value: Float[Array, "B R W K H"],
    num_rows: Int[Array, " B"],
    setup: Setup,
) -> Float[Array, "B W N H"]:
    """What a query a column reads in the first rows."""
    batch, rows, width = key.shape[:3]
    is_above = jnp.arange(rows) < num_rows[:, None]
    ids = jnp.broadcast_to(is_above[..., None].astype(jnp.int32), (batch, rows, width))
    pair = (jnp.ones((batch, 1, width), jnp.int32), ids)
    query = query[:, None].astype(key.dtype)
    return attend_down(query, key, value, pair, rows - 1, setup).output
