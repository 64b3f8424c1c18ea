"""Attention inside balanced clusters: every centroid takes its w best tokens of all.

Not strictly causal: whether a token is taken depends on all others, the later ones too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.attention import _tiles


def best(scores: Float[Array, "B R C S"], size: int) -> Int[Array, "B R C w"]:
    """Returns the positions of each centroid's `size` highest scores, ascending."""
    _, index = jax.lax.top_k(scores, min(size, scores.shape[-1]))
    return jnp.sort(index, axis=-1)


def attend(
    query: Float[Array, "B S R H"],
    key: Float[Array, "B S R H"],
    value: Float[Array, "B S R H"],
    queries: Int[Array, "B R C w"],
    keys: Int[Array, "B R C w"],
    *,
    is_causal: bool,
    segment_ids: Int[Array, "B S"] | None = None,
    masks_self: bool = False,
    **scores: Any,
) -> Float[Array, "B R C w H"]:
    """Returns what each cluster's queries read of its keys, 0 where they may see none.

    Args:
      query: of every token.
      key: of every token.
      value: of every token.
      queries: positions of each cluster's queries.
      keys: positions of its keys.
      is_causal: only keys at or before a query's position are seen.
      segment_ids: only keys of a query's segment are seen.
      masks_self: a token sees itself only where it sees no other.
      **scores: what `_tiles.attend` takes of scale, cap and relative embeddings.
    """
    visible = jnp.asarray(True)
    if is_causal:
        visible = keys[..., None, :] <= queries[..., None]
    if segment_ids is not None:
        ids = jax.vmap(lambda ids, at: ids[at])
        of_queries, of_keys = ids(segment_ids, queries), ids(segment_ids, keys)
        visible &= of_queries[..., None] == of_keys[..., None, :]
    is_self = keys[..., None, :] == queries[..., None]
    return _tiles.attend(
        picked(query, queries),
        picked(key, keys),
        picked(value, keys),
        visible,
        last_resort=is_self if masks_self else None,
        **scores,
    )


def picked(x: Float[Array, "B S R H"], index: Int[Array, "B R C w"]) -> Float[Array, "B R C w H"]:
    """Returns the tokens at the positions."""
    of_head = jax.vmap(jax.vmap(lambda x, at: x[at], in_axes=(1, 0)))
    return of_head(x, index)


def mean(
    x: Float[Array, "B R C w H"], index: Int[Array, "B R C w"], num_tokens: int, epsilon: float
) -> Float[Array, "B S R H"]:
    """Returns, by position, the sum of what clusters hold divided by (their number + epsilon)."""

    def of_head(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.zeros((num_tokens, x.shape[-1]), x.dtype).at[index].add(x)

    number = times(index, num_tokens)[..., None] + epsilon
    return jnp.swapaxes(jax.vmap(jax.vmap(of_head))(x, index) / number.astype(x.dtype), 1, 2)


def times(index: Int[Array, "B R C w"], num_tokens: int) -> Int[Array, "B R S"]:
    """Returns how many clusters took each position."""
    of_head = jax.vmap(jax.vmap(lambda index: jnp.zeros(num_tokens, int).at[index].add(1)))
    return of_head(index)
