"""Attention inside many small tiles, with learned embeddings of relative places.

Nothing of the size of the scores is kept: the backward pass computes them once more. An
accelerator takes all tiles together, a CPU as many at a time as its cache holds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import precision
from sparseformer_jax.model.layers import soft_cap

# Scores that a CPU computes together: 128 KiB in float32.
_SCORES_IN_CACHE = 2**15
# The logit of what is seen only where there is nothing else (Kitaev et al. 2020, section 2).
_LAST_RESORT = -5e4


class Relative(NamedTuple):
    """Embeddings of the difference of places, key's minus query's, clipped to m (Shaw et al. 2018).

    Attributes:
      key: [2m + 1, H], added to the keys.
      value: the same, added to the values.
    """

    key: Float[Array, "D H"]
    value: Float[Array, "D H"]


def attend(
    query: Float[Array, "*N P H"],
    key: Float[Array, "*N W H"],
    value: Float[Array, "*N W V"],
    visible: Bool[Array, "..."],
    *,
    scale: float,
    cap: float | None = None,
    last_resort: Bool[Array, "..."] | None = None,
    relative: Relative | None = None,
    first_place: int = 0,
) -> Float[Array, "*N P V"]:
    """Returns softmax attention of every tile's P queries over its own W keys.

        out_p = sum_j a_pj (v_j + r^v_pj),  a_p = softmax_j(scale q_p . (k_j + r^k_pj))

    over the visible pairs; a query that sees none gets 0.

    Args:
      query: of any number of tiles.
      key: of each tile.
      value: of each tile.
      visible: pairs, broadcast to [*N, P, W].
      scale: of the logits.
      cap: c in c tanh(logits / c).
      last_resort: pairs, broadcast likewise, that count only where a query sees no other.
      relative: r, by j + first_place - p.
      first_place: place of a tile's first key, counted from its first query.
    """
    tiles, shape = query.shape[:-2], (*query.shape[:-1], key.shape[-2])

    def flat(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(x, shape).reshape(-1, *shape[-2:])

    masks = [visible] if last_resort is None else [visible, last_resort]
    out = _attend(
        Plan(scale, cap, first_place),
        tuple(flat(x, x.shape) for x in (query, key, value)),
        relative,
        [x if x.ndim <= 2 else flat(x, shape) for x in masks],
    )
    return out.reshape(*tiles, *out.shape[1:])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of `attend`, as its arguments are."""

    scale: float
    cap: float | None
    first_place: int


# Queries, keys and values, or more, of U tiles: [U, ., .].
_Tiles = tuple[Float[Array, "U _ _"], ...]
# `visible`, and `last_resort` if there is one: [U, P, W], or broadcast if all tiles share it.
_Masks = list[Bool[Array, "..."]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan, tiles: _Tiles, relative: Relative | None, masks: _Masks
) -> Float[Array, "U P V"]:
    """Attention of tiles in one row."""

    def forward(*arrays: Any) -> tuple[jax.Array, None]:
        return together(plan, *arrays), None

    return _on_platform(forward, None, tiles, relative, masks)[0]


def _attend_fwd(plan: Plan, *arrays: Any) -> tuple[Float[Array, "U P V"], tuple[Any, ...]]:
    return _attend(plan, *arrays), arrays


def _attend_bwd(
    plan: Plan, residuals: tuple[_Tiles, Relative | None, _Masks], d_out: Float[Array, "U P V"]
) -> tuple[_Tiles, Relative | None, None]:
    tiles, relative, masks = residuals

    def backward(tiles: _Tiles, relative: Relative | None, masks: _Masks) -> tuple[Any, Any]:
        def forward(tiles: _Tiles, relative: Relative | None) -> jax.Array:
            return together(plan, tiles, relative, masks)

        _, pull = jax.vjp(forward, tiles[:-1], relative)
        return pull(tiles[-1])

    zeros = jax.tree.map(jnp.zeros_like, relative)
    return *_on_platform(backward, zeros, (*tiles, d_out), relative, masks), None


_attend.defvjp(_attend_fwd, _attend_bwd)

# What it returns of every tile, and of all together.
_OfTiles = Callable[[_Tiles, Relative | None, _Masks], tuple[Any, Any]]


def _on_platform(function: _OfTiles, zeros: Any, *arrays: Any) -> tuple[Any, Any]:
    """Calls a function of tiles, on a CPU group by group."""
    in_groups = functools.partial(_in_groups, function, zeros)
    return jax.lax.platform_dependent(*arrays, cpu=in_groups, default=function)


def _in_groups(
    function: _OfTiles, zeros: Any, tiles: _Tiles, relative: Relative | None, masks: _Masks
) -> tuple[Any, Any]:
    """Calls a function of as many tiles at a time as the cache holds.

    Args:
      function: of tiles.
      zeros: to add to what it returns of all tiles together.
      tiles: arrays of U tiles.
      relative: embeddings that all share.
      masks: of U tiles, or of all.
    """
    count, scores = len(tiles[0]), tiles[0].shape[1] * tiles[1].shape[1]
    size = group_size(count, scores)
    own = [mask for mask in masks if mask.ndim == 3]

    def step(sums: Any, group: tuple[_Tiles, _Masks]) -> tuple[Any, Any]:
        tiles, own = group
        of_group = iter(own)
        all_masks = [next(of_group) if mask.ndim == 3 else mask for mask in masks]
        of_tiles, of_all = function(tiles, relative, all_masks)
        return jax.tree.map(jnp.add, sums, of_all), of_tiles

    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (tiles, own))
    sums, of_tiles = jax.lax.scan(step, zeros, groups)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), of_tiles), sums


def group_size(count: int, scores: int) -> int:
    """Returns how many of `count` things, each of so many scores, a CPU computes together.

    It divides their number.
    """
    most = max(1, min(count, _SCORES_IN_CACHE // scores))
    return max(n for n in range(1, most + 1) if count % n == 0)


def together(
    plan: Plan, tiles: _Tiles, relative: Relative | None, masks: _Masks
) -> Float[Array, "U P V"]:
    """Returns attention of tiles at once, all scores in memory.

    Args:
      plan: what is static.
      tiles: queries, keys and values.
      relative: embeddings, see `attend`.
      masks: `visible`, and `last_resort` if there is one.
    """
    query, key, value = tiles
    visible, *last_resort = masks
    exact = precision.exact(query.dtype)
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
        y = y.astype(x.dtype)
        return jnp.einsum(subscripts, x, y, precision=exact, preferred_element_type=dtype)

    logits = product("uph,ujh->upj", query, key)
    num_queries, num_keys = logits.shape[-2:]
    if relative is not None:
        tables = [_by_difference(x, num_queries, num_keys, plan.first_place) for x in relative]
        logits += _skew(product("uph,dh->upd", query, tables[0]), num_keys)
    logits = soft_cap(plan.scale * logits, plan.cap)
    for is_last in last_resort:
        logits = jnp.where(is_last, _LAST_RESORT, logits)
    # Finite, so that a query that sees nothing never meets inf - inf.
    logits = jnp.where(visible, logits, jnp.finfo(dtype).min)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(logits - peak), 0)
    # Divided by only in the end: of a query's numbers those are the fewest.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(query.dtype)
    out = product("upj,ujh->uph", weights, value)
    if relative is not None:
        out += product("upd,dh->uph", _unskew(weights), tables[1])
    return (out / jnp.where(total == 0, 1, total)).astype(query.dtype)


def _by_difference(
    table: Float[Array, "D H"], num_queries: int, num_keys: int, first_place: int
) -> Float[Array, "X H"]:
    """The table's rows of all differences in a tile, from the lowest, P + W - 1 of them."""
    most = table.shape[0] // 2
    differences = first_place + np.arange(1 - num_queries, num_keys)
    return table[np.clip(differences, -most, most) + most]


def _skew(x: Float[Array, "*N P X"], num_keys: int) -> Float[Array, "*N P W"]:
    """Returns y[p, j] = x[p, j - p + P - 1]: by difference to by key, by reshaping alone."""
    *tiles, rows, columns = x.shape
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*tiles, -1)
    x = x[..., rows - 1 : rows - 1 + rows * columns]
    return x.reshape(*tiles, rows, columns)[..., :num_keys]


def _unskew(y: Float[Array, "*N P W"]) -> Float[Array, "*N P X"]:
    """Returns x[p, j - p + P - 1] = y[p, j], 0 elsewhere: what `_skew` undoes."""
    *tiles, rows, num_keys = y.shape
    columns = num_keys + rows - 1
    y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, columns - num_keys)]).reshape(*tiles, -1)
    y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(rows - 1, 1)])
    return y.reshape(*tiles, rows, columns + 1)[..., :columns]
