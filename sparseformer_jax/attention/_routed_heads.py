"""Routed heads: their vectors, and attention inside the clusters that these fall into.

`options` are `routing.Options`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.attention import _balanced, _clusters, _last_members
from sparseformer_jax.attention.base import AttentionOutput
from sparseformer_jax.attention.inputs import Inputs, Shard

# Added to the number of clusters that took a token, as in the authors' code.
_TAKEN = 0.01


class Vectors(NamedTuple):
    """Normalised vectors, the scores of the centroids, and the nearest one of each."""

    x: Float[Array, "B S R H"]
    scores: Float[Array, "B R C S"]
    nearest: Int[Array, "B R S"]


def vectors(x: Float[Array, "B S R H"], centroids: Float[Array, "R C H"]) -> Vectors:
    """Returns the vectors of projected tokens."""
    x = _clusters.normalise(x)
    scores = _clusters.scores(x, centroids)
    return Vectors(x, scores, jnp.argmax(scores, axis=2))


def of_queries(vectors: Vectors, num_queries: int, shard: Shard) -> Vectors:
    """Returns the part of all tokens' vectors that the local queries are."""
    if num_queries == vectors.x.shape[1]:
        return vectors

    def part(x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, shard.query_offset, num_queries, axis)

    return Vectors(part(vectors.x, 1), part(vectors.scores, 3), part(vectors.nearest, 2))


def attend_last_members(
    options: Any,
    inputs: Inputs,
    shard: Shard,
    vectors: Vectors,
    value: Float[Array, "B S R H"],
    scores: dict[str, Any],
) -> tuple[Float[Array, "B T R H"], dict[str, jax.Array]]:
    """Returns attention to the last members of each query's cluster, and diagnostics."""
    num_clusters, num_keys = options.num_clusters, value.shape[1]
    size = _last_members.block_size(options.window_size)
    output = _last_members.attend(
        vectors.x.astype(value.dtype),
        value,
        _last_members.sort(vectors.nearest, num_clusters, size),
        options.window_size,
        num_clusters=num_clusters,
        num_queries=inputs.query.shape[1],
        query_offset=shard.query_offset,
        segment_ids=inputs.segment_ids,
        **scores,
    )
    counts = _clusters.sizes(vectors.nearest, num_clusters).astype(jnp.float32)
    return output, {
        "density": jnp.mean(density(options, counts, num_keys, is_causal=True)),
        **_shares(counts),
    }


def attend_balanced(
    options: Any,
    inputs: Inputs,
    shard: Shard,
    query: Vectors,
    key: Vectors,
    value: Float[Array, "B S R H"],
    is_causal: bool,
    scores: dict[str, Any],
) -> tuple[Float[Array, "B T R H"], dict[str, jax.Array]]:
    """Returns attention inside the clusters that centroids choose, and diagnostics."""
    num_queries, num_keys = inputs.query.shape[1], value.shape[1]
    keys = queries = _balanced.best(key.scores, options.window_size)
    if not options.share_qk:
        queries = _balanced.best(query.scores, options.window_size)
    read = _balanced.attend(
        query.x.astype(value.dtype),
        key.x.astype(value.dtype),
        value,
        queries,
        keys,
        is_causal=is_causal,
        segment_ids=None if inputs.segment_ids is None else inputs.segment_ids[1],
        **scores,
    )
    output = _balanced.mean(read, queries, num_keys, _TAKEN)
    if num_queries < num_keys:
        output = jax.lax.dynamic_slice_in_dim(output, shard.query_offset, num_queries, axis=1)
    counts = _clusters.sizes(key.nearest, options.num_clusters).astype(jnp.float32)
    return output, {
        "density": density(options, jnp.zeros(options.num_clusters), num_keys, is_causal),
        "untaken": jnp.mean(_balanced.times(queries, num_keys) == 0, dtype=jnp.float32),
        **_shares(counts),
    }


def attend_without(options: Any, inputs: Inputs) -> AttentionOutput:
    """Returns what a model without routed heads has of them."""
    batch, num_queries, _, head_dim = inputs.query.shape
    sums = jnp.zeros((0, 1, options.num_clusters, head_dim))
    return AttentionOutput(
        jnp.zeros((batch, num_queries, 0, head_dim), inputs.query.dtype),
        diagnostics={"density": 0.0},
        statistics={"counts": sums[..., 0], "sums": sums},
    )


def _shares(counts: Float[Array, "B R C"]) -> dict[str, Float[Array, ""]]:
    """The fraction of a sequence nearest to its smallest, median and largest cluster's centroid."""
    shares = counts / jnp.sum(counts, axis=-1, keepdims=True)
    found = {
        "smallest_cluster": jnp.min(shares, axis=-1),
        "median_cluster": jnp.median(shares, axis=-1),
        "largest_cluster": jnp.max(shares, axis=-1),
    }
    return {name: jnp.mean(share) for name, share in found.items()}


def inspect(
    options: Any, vectors: Vectors, segment_ids: Int[Array, "B S"] | None
) -> dict[str, Array]:
    """Returns which clusters hold which tokens of a window, by name.

    They are "members" [B, R, C, S], whether a cluster holds a query: with "causal" its nearest
    one, with "paper" those that took it; "sizes" [B, R, C], of how many tokens each centroid
    is the nearest; "mates" [B, R, S], the members of a token's nearest one in its document
    before it.
    """
    nearest = vectors.nearest
    is_nearest = nearest[:, :, None] == jnp.arange(options.num_clusters)[:, None]
    members = is_nearest
    if options.selection == "paper":
        taken = _balanced.best(vectors.scores, options.window_size)
        tokens = jnp.arange(nearest.shape[-1])
        members = jnp.any(taken[..., None] == tokens, axis=-2)
    same = jnp.tril(nearest[..., :, None] == nearest[..., None, :], -1)
    if segment_ids is not None:
        same &= (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    sizes, mates = jnp.sum(is_nearest, axis=-1), jnp.sum(same, axis=-1)
    return {"members": members, "sizes": sizes, "mates": mates}


def density(
    options: Any, counts: Float[Array, "*N C"], seq_len: int, is_causal: bool
) -> Float[Array, "*N"]:
    """Returns the fraction of (causal) pairs that clusters of so many members attend to.

    With "paper" all clusters have w, whatever the counts.
    """
    if options.selection == "paper":
        counts = jnp.full_like(counts, min(options.window_size, seq_len))
    size = jnp.minimum(counts, options.window_size)
    pairs = size * (size + 1) / 2 + (counts - size) * size
    if not is_causal:
        pairs = size**2
    if options.masks_self and options.window_size > 1:
        # All but the first of a causal cluster, which sees nothing else.
        pairs -= counts - jnp.minimum(counts, 1) * is_causal
    full = seq_len * (seq_len + 1) / 2 if is_causal else seq_len**2
    return jnp.sum(pairs, axis=-1) / full
