"""Attention inside many small tiles at once, with learned embeddings of relative places."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pallas_kernels import precision
from sparseformer_jax.model.layers import soft_cap

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
    exact = precision.exact(query.dtype)
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
        y = y.astype(x.dtype)
        return jnp.einsum(subscripts, x, y, precision=exact, preferred_element_type=dtype)

    logits = product("...ph,...jh->...pj", query, key)
    num_queries, num_keys = logits.shape[-2:]
    if relative is not None:
        tables = [_by_difference(x, num_queries, num_keys, first_place) for x in relative]
        logits += _skew(product("...ph,dh->...pd", query, tables[0]), num_keys)
    logits = soft_cap(scale * logits, cap)
    if last_resort is not None:
        logits = jnp.where(last_resort, _LAST_RESORT, logits)
    # Finite, so that a query that sees nothing never meets inf - inf.
    logits = jnp.where(visible, logits, jnp.finfo(dtype).min)
    weights = jnp.where(visible, jax.nn.softmax(logits), 0).astype(query.dtype)
    out = product("...pj,...jh->...ph", weights, value)
    if relative is not None:
        out += product("...pd,dh->...ph", _unskew(weights), tables[1])
    return out.astype(query.dtype)


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


def look_back(x: Shaped[Array, "*N M P H"], blocks: int) -> Shaped[Array, "*N M W H"]:
    """Returns each block of P rows behind as many earlier ones, zeros before the first.

    W is (blocks + 1) P.
    """
    axis = x.ndim - 3
    padding = [(0, 0)] * x.ndim
    padding[axis] = (blocks, 0)
    padded = jnp.pad(x, padding)
    shifted = [
        jax.lax.slice_in_dim(padded, j, j + x.shape[axis], axis=axis) for j in range(blocks + 1)
    ]
    return jnp.concatenate(shifted, axis=-2)
