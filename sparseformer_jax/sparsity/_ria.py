"""RIA, relative importance and activations, with a permutation of inputs for n:m.

Zhang et al. 2024, "Plug-and-play: an efficient post-training pruning method for large language
models" (ICLR 2024).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.sparsity._selection import grouped
from sparseformer_jax.sparsity._statistics import Statistics
from sparseformer_jax.sparsity.nm import Pattern


def scores(
    weight: Float[Array, "I O"], statistics: Statistics, power: float = 0.5
) -> Float[Array, "I O"]:
    """Returns (|w| / sum over outputs + |w| / sum over inputs) ||x||^a; 0 where a weight is.

    Args:
      weight: W.
      statistics: of the inputs.
      power: a.
    """
    size = jnp.abs(weight.astype(jnp.float32))
    parts = [size / jnp.sum(size, axis=axis, keepdims=True) for axis in (1, 0)]
    relative = jnp.where(size == 0, 0, parts[0] + parts[1])
    return relative * jnp.power(statistics.mean_square, power / 2)[:, None]


def order(scores: Float[Array, "I O"], pattern: Pattern) -> Int[Array, " I"]:
    """Returns the order of inputs in which n:m keeps more of the scores: `permutation`, or as is.

    Raises:
      ConfigError: the inputs do not divide into groups.
    """
    orders = jnp.stack([jnp.arange(len(scores)), permutation(scores, pattern.m)])
    kept = [jnp.sum(jnp.where(grouped(scores[each], pattern), scores[each], 0)) for each in orders]
    return orders[jnp.argmax(jnp.stack(kept))]


def permutation(scores: Float[Array, "I O"], m: int) -> Int[Array, " I"]:
    """Returns an order of inputs of which groups of m share the large ones.

    Sorted by their sum of scores, inputs are dealt in m rounds to the groups, forwards and
    backwards by turns.

    Args:
      scores: of the weights.
      m: inputs of a group; it divides them.
    """
    rounds = jnp.argsort(jnp.sum(scores, axis=1), stable=True).reshape(m, -1)
    rounds = rounds.at[1::2].set(rounds[1::2, ::-1])
    return rounds.T.reshape(-1)
