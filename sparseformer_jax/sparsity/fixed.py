"""Masks that stay as they are: what one-shot pruning leaves, which may train on.

    W' = m W

with no gradient to what is dropped, which stays in the checkpoint as it was.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sparseformer_jax.sparsity import nm
from sparseformer_jax.sparsity.base import Applied, Mask, State, Target, WeightSparsity, hard
from sparseformer_jax.sparsity.targets import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of fixed masks.

    Attributes:
      targets: what is sparse, as "ff=2:4" or "all"; without a pattern the mask must be given.
      prior: WORKDIR or WORKDIR:STEP of a run whose masks these are; "": the largest weights
        of each group are kept.
    """

    targets: tuple[str, ...] = ("all=2:4",)
    prior: str = ""


def check(options: Options, config: ConfigDict) -> None:
    """Checks the targets.

    Raises:
      ValueError: there are none, or one cannot be read.
    """
    parse(options.targets)


class Method(WeightSparsity):
    """Fixed masks."""

    variables = {"mask": Mask}

    @property
    def prior_run(self) -> str:
        """The run whose masks these are."""
        return self.options.prior

    @property
    def keeps_prior(self) -> bool:
        """True: nothing moves them."""
        return True

    def init(self, weight: Any, target: Target, key: Any, prior: Any) -> State:
        """Returns the given mask, or that of the largest weights."""
        if prior is not None:
            return {"mask": prior}
        if target.pattern is None:
            return {"mask": jnp.ones(weight.shape, bool)}
        n, m = target.pattern.n, target.pattern.m
        return {"mask": nm.mask(jnp.abs(weight), n, m, target.axis)}

    def apply(self, weight: Any, state: State, target: Target, step: Any, key: Any) -> Applied:
        """Returns the kept entries."""
        return Applied(hard(weight, state["mask"]))

    def update(
        self,
        old: Any,
        weight: Any,
        state: State,
        target: Target,
        step: Any,
        learning_rate: Any,
    ) -> tuple[Any, State]:
        """Returns dropped entries as they were: weight decay does not reach them."""
        return jnp.where(state["mask"], weight, old), state

    def training_density(self, pattern: nm.Pattern, steps: np.ndarray) -> np.ndarray:
        """Returns the pattern's density."""
        return np.full(len(steps), pattern.density)

    def kept(self, weight: Any, state: State, target: Target) -> Any:
        """Returns the mask."""
        return state["mask"]
