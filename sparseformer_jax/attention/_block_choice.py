"""Which blocks of keys are attended to, by the scores of a gate; and what a gate is to score.

Letters: n heads, M rows (blocks of queries, or single ones) and J blocks of keys.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scores = Float[Array, "B n M J"]
Choice = Bool[Array, "B n M J"]


def above(scores: Scores, visible: Bool[Array, "..."], threshold: float) -> Choice:
    """Returns the visible blocks whose share, a softmax over those, is more than a threshold."""
    return visible & (jnp.exp(log_shares(scores, visible)) > threshold)


def highest(
    scores: Scores,
    visible: Bool[Array, "..."],
    most: int,
    counts: Int[Array, " B"] | None = None,
) -> Choice:
    """Returns the visible blocks of the highest scores, at most `most` a row.

    Of each sequence only `counts`, which are no more than that; None: as many.
    """
    if most < 1:
        return jnp.zeros(scores.shape, bool)
    visible = jnp.broadcast_to(visible, scores.shape)
    scores = jnp.where(visible, scores, -jnp.inf)
    _, best = jax.lax.top_k(scores, min(most, scores.shape[-1]))
    is_taken = jnp.ones(best.shape, bool)
    if counts is not None:
        is_taken = is_taken & (jnp.arange(best.shape[-1]) < counts[:, None, None, None])
    nothing = jnp.zeros(scores.shape, bool)
    return visible & jnp.put_along_axis(nothing, best, is_taken, axis=-1, inplace=False)


def count_of_density(density: float, num_blocks: int) -> int:
    """Returns how many blocks each row keeps, so that causality leaves a density of all pairs.

    max(1, floor((1 - sqrt(1 - density)) J)):  keeping a of J leaves 1 - (1 - a/J)^2
    """
    return max(1, int((1 - math.sqrt(1 - density)) * num_blocks))


def log_shares(scores: Scores, visible: Bool[Array, "..."]) -> Scores:
    """Returns log softmax over the visible blocks; 0 at the others, so that nothing is NaN."""
    hidden = jnp.finfo(scores.dtype).min
    shares = jax.nn.log_softmax(jnp.where(visible, scores, hidden), axis=-1)
    return jnp.where(visible, shares, 0)


def shares_of(maxima: Scores, visible: Bool[Array, "..."], epsilon: float = 0.0) -> Scores:
    """Returns a gate's target: the largest weights of visible blocks, divided by a row's sum.

    Args:
      maxima: of `block_max_attention`.
      visible: blocks that a row may learn of; a row without any is 0.
      epsilon: added to the sum.
    """
    maxima = jnp.where(visible, maxima, 0)
    total = jnp.sum(maxima, axis=-1, keepdims=True) + epsilon
    return maxima / jnp.where(total > 0, total, 1)


def divergence(
    target: Scores, scores: Scores, visible: Bool[Array, "..."]
) -> Float[Array, "B n M"]:
    """Returns sum_j p_j (log p_j - log q_j) of each row, q a softmax over the visible blocks."""
    is_some = target > 0
    log_target = jnp.log(jnp.where(is_some, target, 1))
    terms = target * (log_target - log_shares(scores, visible))
    return jnp.sum(jnp.where(is_some, terms, 0), axis=-1)


def fraction(part: Array, whole: Array) -> Float[Array, "B n M"]:
    """Returns the sum over a row's blocks divided by that of another; 1 where that is 0."""
    part, whole = (jnp.sum(x, axis=-1, dtype=jnp.float32) for x in (part, whole))
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 1)
