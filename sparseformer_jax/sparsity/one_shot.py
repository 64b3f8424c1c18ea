"""Prunes a trained matrix at one stroke, from its inputs on a little text.

A weight is W [I, O] of y = x W: a kernel's input dimensions and its output dimensions, flattened.
All is pure and runs under jit.

- magnitude: |w|.
- Wanda: |w| ||x|| (Sun et al. 2023, arXiv 2306.11695).
- RIA: the weight's part of all at its input and at its output, times ||x||^(1/2) (`_ria`).
- SparseGPT: what second order says, with or without an update of what is kept (`_sparsegpt`).
- DSnoT exchanges weights of a mask, of any of them (`_dsnot`).

n:m keeps the n largest of every m inputs. Of a kept fraction Wanda compares the weights of an
output; magnitude and RIA those of the whole matrix, and SparseGPT those of 128 inputs, where, as
released, one more goes than the share.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparseformer_jax.checks import ConfigError, check_choice
from sparseformer_jax.sparsity import _dsnot, _ria, _selection, _sparsegpt
from sparseformer_jax.sparsity._selection import AnyPattern
from sparseformer_jax.sparsity._statistics import Statistics
from sparseformer_jax.sparsity.nm import Pattern

METHODS = ("magnitude", "wanda", "sparsegpt", "ria")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to a matrix.

    Attributes:
      method: one of METHODS.
      pattern: n:m along the inputs, or a kept fraction.
      update_weights: whether SparseGPT changes the kept weights, too.
      dsnot: whether DSnoT refines the mask.
      permute: whether, for RIA's n:m, inputs whose order is free are dealt to groups anew.

    Raises:
      ConfigError: the method is unknown, or the steps do not go together.
    """

    method: str
    pattern: AnyPattern
    update_weights: bool = False
    dsnot: bool = False
    permute: bool = False

    def __post_init__(self) -> None:
        check_choice("--method", self.method, METHODS)
        if self.update_weights and self.method != "sparsegpt":
            raise ConfigError(
                f"--update_weights: {self.method} changes no weights; take --method=sparsegpt"
            )
        if self.update_weights and self.dsnot:
            raise ConfigError(
                "--dsnot: revives weights that --update_weights has made up for; leave one out"
            )

        if self.permute and not (self.method == "ria" and isinstance(self.pattern, Pattern)):
            raise ConfigError(
                f"--permute: deals inputs to groups by RIA's scores, not for {self.method} with"
                f" {self.pattern}; take --method=ria and n:m"
            )

    @property
    def reads_products(self) -> bool:
        """Whether it needs x x', the only statistic of I^2 numbers."""
        return self.method == "sparsegpt"

    @property
    def reads_inputs(self) -> bool:
        """Whether it needs any statistics."""
        return self.method != "magnitude" or self.dsnot


class Pruned(NamedTuple):
    """A matrix that was pruned.

    Attributes:
      weight: as it was given, unless it is updated; then with zeros where it is not kept.
      mask: which weights are kept.
      scores: what each was worth.
    """

    weight: Float[Array, "I O"]
    mask: Bool[Array, "I O"]
    scores: Float[Array, "I O"]


def prune(recipe: Recipe, weight: Float[Array, "I O"], statistics: Statistics | None) -> Pruned:
    """Returns the matrix with its mask.

    Args:
      recipe: what is done.
      weight: W.
      statistics: of its inputs; None where none are read.

    Raises:
      ConfigError: the inputs do not divide into groups.
      ValueError: statistics are missing.
    """
    if statistics is None and recipe.reads_inputs:
        raise ValueError(f"statistics=None: {recipe} reads them")
    if recipe.method == "sparsegpt" and statistics is not None:
        weight, mask, ranking = _sparsegpt.sparsegpt(
            weight, statistics.hessian, recipe.pattern, update_weights=recipe.update_weights
        )
    else:
        ranking = scores(recipe.method, weight, statistics)
        mask = select(recipe.method, ranking, recipe.pattern)
    if recipe.dsnot and statistics is not None:
        mask = _dsnot.refine(weight, statistics, mask, ranking, recipe.pattern)
    return Pruned(weight, mask, ranking)


def scores(
    method: str, weight: Float[Array, "I O"], statistics: Statistics | None
) -> Float[Array, "I O"]:
    """Returns what a weight is worth to magnitude, Wanda or RIA, the more the larger."""
    size = jnp.abs(weight.astype(jnp.float32))
    if statistics is None or method == "magnitude":
        return size
    if method == "wanda":
        return size * jnp.sqrt(statistics.mean_square)[:, None]
    return _ria.scores(weight, statistics)


def select(method: str, scores: Float[Array, "I O"], pattern: AnyPattern) -> Bool[Array, "I O"]:
    """Returns which weights magnitude, Wanda or RIA keeps by its scores.

    Raises:
      ConfigError: the inputs do not divide into groups.
    """
    if isinstance(pattern, Pattern):
        return _selection.grouped(scores, pattern)
    if method == "wanda":
        return _selection.by_output(scores, pattern.num_dropped(len(scores)))
    return _selection.of_all(scores, _selection.beyond_share(pattern, scores.size))
