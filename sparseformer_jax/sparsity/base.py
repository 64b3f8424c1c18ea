"""What every method of weight sparsity shares: which weights, and where their state lives.

A method makes of a weight W, of state beside it and of the step the weight that products see:

    W' = apply(W, state, step, key)

It is written once, for one weight, by pure functions: of a layer's, in training, inside the scan
over layers, so that no mask of all layers is ever there at once; of stacked ones elsewhere, which
have axes more at the front. Axes are therefore counted from the end.

State has names beside the weight's, "layers/7/mlp/up/mask" beside "layers/7/mlp/up/kernel", and is
sharded, saved and restored as parameters are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from sparseformer_jax.sparsity.nm import Pattern

State = dict[str, Any]


class Mask(nnx.Variable):
    """Which entries of a weight are kept; no gradient moves it."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight that is made sparse.

    Attributes:
      pattern: what is kept of it in the end; None: what a given mask says.
      axis: along which its groups lie, negative: the last that its product sums over.
      ndim: dimensions of a layer's weight.
    """

    pattern: Pattern | None
    axis: int
    ndim: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Applied:
    """What a method makes of a weight in a step of training.

    Attributes:
      weight: that products see.
      losses: by name, their coefficient included, of this weight in one step.
      diagnostics: scalars by name.
    """

    # Any: JAX also builds it of partitions and shapes.
    weight: Any
    losses: Any = dataclasses.field(default_factory=dict)
    diagnostics: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WeightSparsity:
    """Sparsity of weights; a subclass overrides `init`, `apply`, `kept` and what else it needs.

    Attributes:
      options: of the method.
      variables: its state by name, with the type of each variable: an `nnx.Param` is trained by
        gradients. An array of state has the weight's dimensions, shorter where entries share a
        number, and may have more in front of them.
      mask_itemsize: bytes an entry of a mask takes in training.
    """

    options: Any
    variables: ClassVar[Mapping[str, type[nnx.Variable]]] = {}
    mask_itemsize: ClassVar[int] = 1

    def state_names(self, weight: str) -> dict[str, str]:
        """Returns where the state of a weight stands, "layers/7/mlp/up/mask", by its own names."""
        module = weight.rpartition("/")[0]
        return {own: f"{module}/{own}" for own in self.variables}

    @property
    def prior_run(self) -> str:
        """WORKDIR or WORKDIR:STEP of the run whose masks `init` is given; "": none."""
        return ""

    @property
    def keeps_prior(self) -> bool:
        """Whether masks stay those of another run, which then must be of the targets' patterns."""
        return False

    @property
    def follows_weights(self) -> bool:
        """Whether weights and step say all of the state, so that another run's is not taken."""
        return False

    @property
    def resets_moments(self) -> bool:
        """Whether the optimiser forgets its moments of an entry that a mask takes or drops."""
        return False

    def optimizer_group(self, name: str) -> dict[str, float]:
        """Returns `learning_rate_multiplier` and `weight_decay` of a trained state; {}: none."""
        return {}

    def training_density(self, pattern: Pattern, steps: np.ndarray) -> np.ndarray:
        """Returns the part of a dense weight's training FLOPs that steps need, [S].

        A third each for the product, the gradient of its input and that of the weight.
        """
        raise NotImplementedError

    def largest_group(self, pattern: Pattern) -> int:
        """Returns the most entries of a group that a weight of a pattern is ever cut into."""
        return pattern.m

    def init(
        self,
        weight: Float[Array, "*S"],
        target: Target,
        key: Key[Array, ""],
        prior: Bool[Array, "*S"] | None,
    ) -> State:
        """Returns the state of one layer's weight before the first step.

        Args:
          weight: as training starts with it.
          target: what it is to become.
          key: of what is drawn.
          prior: a mask to start from; None: there is none.
        """
        raise NotImplementedError

    def apply(
        self,
        weight: Float[Array, "*S"],
        state: State,
        target: Target,
        step: Any,
        key: Key[Array, ""],
    ) -> Applied:
        """Returns what training sees of a layer's weight; differentiable.

        Args:
          weight: dense.
          state: of the weight.
          target: what it is to become.
          step: of training.
          key: of the step, the layer and the weight; the same for all pieces of a batch.
        """
        raise NotImplementedError

    def update(
        self,
        old: Float[Array, "*S"],
        weight: Float[Array, "*S"],
        state: State,
        target: Target,
        step: Any,
        learning_rate: Any,
    ) -> tuple[Float[Array, "*S"], State]:
        """Returns weight and state after the optimiser's step: what no gradient moves.

        Args:
          old: the dense weight before the optimiser's step.
          weight: dense, as the optimiser left it.
          state: of the weight, as the optimiser left it.
          target: what it is to become.
          step: that comes next.
          learning_rate: of the step that was done.
        """
        return weight, state

    def kept(self, weight: Float[Array, "*S"], state: State, target: Target) -> Bool[Array, "*S"]:
        """Returns the hard mask, of which evaluation and generation make W' = W where it keeps."""
        raise NotImplementedError


def hard(weight: Float[Array, "*S"], kept: Bool[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns a weight with zeros where it is not kept."""
    return jnp.where(kept, weight, jnp.zeros((), weight.dtype))
