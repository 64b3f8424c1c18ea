"""Clusters of tokens around centroids that follow a moving average: routing's learned state.

Vectors and centroids lie near a sphere of radius sqrt(H), so the nearest centroid is the one
of largest dot product. Shapes: R routed heads, C clusters, w tokens a cluster.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import precision

Update = Literal["mean", "released", "paper", "frozen"]

# Of the counts, so that a cluster without members is not divided by zero.
_SMOOTHING = 1e-5


def normalise(x: Float[Array, "*S H"]) -> Float[Array, "*S H"]:
    """Returns (x - mean(x)) / std(x) in float32 or wider: LayerNorm without scale and shift."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x -= jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def initial(key: jax.Array, shape: tuple[int, int, int]) -> Float[Array, "R C H"]:
    """Returns centroids spread evenly over the sphere of radius sqrt(H)."""
    x = jax.random.normal(key, shape)
    return x * math.sqrt(shape[-1]) / jnp.linalg.norm(x, axis=-1, keepdims=True)


def scores(x: Float[Array, "B S R H"], centroids: Float[Array, "R C H"]) -> Float[Array, "B R C S"]:
    """Returns the dot product of every centroid with every vector of its head."""
    return jnp.einsum(
        "bsrh,rch->brcs",
        jax.lax.stop_gradient(x),
        jax.lax.stop_gradient(centroids).astype(x.dtype),
        precision=precision.exact(x.dtype),
    )


def commitment(
    x: Float[Array, "B T R H"],
    centroids: Float[Array, "R C H"],
    nearest: Int[Array, "B R T"],
) -> Float[Array, "B T"]:
    """Returns each token's mean squared distance to its nearest centroid, over heads and H."""
    heads = jnp.arange(centroids.shape[0])[:, None]
    target = jax.lax.stop_gradient(centroids)[heads, nearest]  # [B, R, T, H]
    return jnp.mean(jnp.square(x - jnp.swapaxes(target, 1, 2)), axis=(2, 3))


def sizes(nearest: Int[Array, "*N S"], num_clusters: int) -> Int[Array, "*N C"]:
    """Returns how many tokens are nearest to each centroid."""
    return jnp.sum(nearest[..., None, :] == jnp.arange(num_clusters)[:, None], axis=-1)


def members(
    x: Float[Array, "B T R H"],
    nearest: Int[Array, "B R T"],
    weights: Float[Array, "B T"],
    num_clusters: int,
) -> tuple[Float[Array, "R C"], Float[Array, "R C H"]]:
    """Returns the number of each cluster's tokens and the sum of their vectors, weighed."""
    x = jax.lax.stop_gradient(x) * weights[..., None, None]
    heads = jnp.arange(x.shape[2])[:, None]
    at = heads, nearest  # [B, R, T]
    counts = jnp.zeros((x.shape[2], num_clusters), x.dtype)
    sums = jnp.zeros((*counts.shape, x.shape[3]), x.dtype)
    counts = counts.at[at].add(jnp.broadcast_to(weights[:, None], nearest.shape))
    return counts, sums.at[at].add(jnp.swapaxes(x, 1, 2))


def moved(
    update: Update,
    decay: float,
    variables: dict[str, jax.Array],
    counts: Float[Array, "R Q C"],
    sums: Float[Array, "R Q C H"],
) -> dict[str, jax.Array]:
    """Returns the centroids, and what they average, after tokens of these counts and sums.

        mean      c <- a c + (1 - a) counts,  s <- a s + (1 - a) sums,  centroid <- s / c
        paper     centroid <- a centroid + (1 - a) sums

    with a the decay. "mean" starts with the members of even clusters, so that its first step
    is an average like any other. "released" is the same as the authors' code has it: c starts
    at 0 but s at the centroid, so that the first centroids are far too long and heal in about
    1 / (1 - a) steps. Dividing, c is smoothed: (c + e) / (n + C e) n with n its sum, e = 1e-5.
    Queries and keys (Q = 2, where they differ) follow one another, in "paper" by halves.

    Roy et al. 2021, algorithm 1; van den Oord et al. 2017, appendix A.1.
    """
    if update == "frozen":
        return {}
    if update == "paper":
        centroids = decay * variables["centroids"] + (1 - decay) * jnp.mean(sums, axis=1)
        return {"centroids": centroids}
    for kind in range(counts.shape[1]):
        if update == "mean":
            variables = _started_even(variables, counts[:, kind])
        variables = _averaged(decay, variables, counts[:, kind], sums[:, kind])
    return variables


def _started_even(variables: dict[str, jax.Array], counts: jax.Array) -> dict[str, jax.Array]:
    """The variables, before their first step with as many members in every cluster."""
    is_first = jnp.sum(variables["counts"], axis=-1, keepdims=True) == 0
    even = jnp.broadcast_to(jnp.mean(counts, axis=-1, keepdims=True), counts.shape)
    sums = even[..., None] * variables["centroids"]
    return {
        "centroids": variables["centroids"],
        "counts": jnp.where(is_first, even, variables["counts"]),
        "sums": jnp.where(is_first[..., None], sums, variables["sums"]),
    }


def _averaged(
    decay: float, variables: dict[str, jax.Array], counts: jax.Array, sums: jax.Array
) -> dict[str, jax.Array]:
    """The moving averages one step on, and the centroids that they make."""
    counts = decay * variables["counts"] + (1 - decay) * counts
    sums = decay * variables["sums"] + (1 - decay) * sums
    total = jnp.sum(counts, axis=-1, keepdims=True)
    smoothed = (counts + _SMOOTHING) / (total + counts.shape[-1] * _SMOOTHING) * total
    # Before any token came there is nothing to divide by.
    has_members = (total > 0)[..., None]
    means = sums / jnp.where(has_members, smoothed[..., None], 1)
    centroids = jnp.where(has_members, means, variables["centroids"])
    return {"centroids": centroids, "counts": counts, "sums": sums}
