"""Progressive Gradient Flow: n:m weights from dense ones, by decaying what a mask drops.

    W' = W (m + (1 - m) beta(step)),  m: the n largest |W| of every m, taken anew as W moves

- sr_ste: beta = 0 and gradients go straight through, with weight decay on what is dropped,
  dL/dW = dL/dW' + lambda (1 - m) W (Zhou et al. 2021, arXiv 2102.04010, equation 8).
- mdgf_linear, mdgf_exponential: mask decay, beta = max(1 - c s, 0) or exp(-c s) with s the steps
  since the dense phase; then hard masks, beta = 0.
- sdgf_stepwise, sdgf_geometric: structure decay, beta = 0 and patterns that tighten: M-1:M, M/2:M,
  M/4:M, .. to N:M, or 8N:8M, 4N:4M, 2N:2M, N:M.

Bambhaniya et al. 2024, arXiv 2402.04744, and its two releases, which differ in what reaches a
dropped weight: in AQT's JAX code the gradient of the formula, G (m + (1 - m) beta), "scaled" here
and the default; in the PyTorch repository all of it, "straight_through".

Phases are functions of the step: dense, then decay, then hard. A dense phase has masks that keep
all, so that evaluation, which takes hard masks, is dense too.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from sparseformer_jax.sparsity import nm
from sparseformer_jax.sparsity.base import Applied, Mask, State, Target, WeightSparsity
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.sparsity.targets import check_patterns

Recipe = Literal["sr_ste", "mdgf_linear", "mdgf_exponential", "sdgf_stepwise", "sdgf_geometric"]

_GEOMETRIC_STAGES = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Progressive Gradient Flow.

    Attributes:
      recipe: how weights become sparse.
      targets: what is sparse: "ff=2:4" the MLPs, "qkv=1:4", "all=2:4" both and the attention's
        output, or a regular expression on names; the first that fits a weight counts.
      dense_steps: of the dense phase.
      decay_steps: of the decay phase, after it; then masks are hard.
      decay_rate: c of mask decay, each step; None: linear decay ends with the phase, and
        exponential decay comes to 1 in a thousand.
      pruned_grad: of the gradient, what reaches a dropped weight: "scaled" by beta,
        "straight_through" all, "blocked" nothing. SR-STE's is straight through.
      sr_ste_weight: lambda of SR-STE.
      sr_ste_decoupled: whether that is subtracted after the optimiser, times the learning rate,
        as AdamW's decay; else it is a part of the gradient.
      mask_every: steps between masks; a new pattern brings new ones at once.
      moments: of an entry that a mask takes or drops, the optimiser's are to "keep" or "reset".

    Raises:
      ValueError: an option is out of its range, or read by nothing.
    """

    recipe: Recipe = "mdgf_exponential"
    targets: tuple[str, ...] = ("ff=2:4",)
    dense_steps: int = 0
    decay_steps: int = 1000
    decay_rate: float | None = None
    pruned_grad: Literal["scaled", "straight_through", "blocked"] = "scaled"
    sr_ste_weight: float = 2e-4
    sr_ste_decoupled: bool = False
    mask_every: int = 1
    moments: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        for name, least in (("dense_steps", 0), ("decay_steps", 1), ("mask_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.decay_rate is not None and self.decay_rate <= 0:
            raise ValueError(f"decay_rate={self.decay_rate}: must be positive")
        if self.sr_ste_weight < 0:
            raise ValueError(f"sr_ste_weight={self.sr_ste_weight}: must be at least 0")
        unread = {
            "decay_rate": (self.decay_rate, None, self.is_mask_decay),
            "sr_ste_weight": (self.sr_ste_weight, 2e-4, self.recipe == "sr_ste"),
            "sr_ste_decoupled": (self.sr_ste_decoupled, False, self.recipe == "sr_ste"),
            "pruned_grad": (self.pruned_grad, "scaled", self.recipe != "sr_ste"),
        }
        for name, (value, default, is_read) in unread.items():
            if value != default and not is_read:
                raise ValueError(
                    f"{name}={value!r}: recipe={self.recipe!r} does not read it; set it to "
                    f"{default!r}"
                )

    @property
    def is_mask_decay(self) -> bool:
        """Whether dropped weights fade."""
        return self.recipe.startswith("mdgf")


def check(options: Options, config: ConfigDict) -> None:
    """Checks the targets, and that the phases fit the run.

    Raises:
      ValueError: a target has no pattern, or masks would never be hard.
    """
    check_patterns(options.targets)
    num_steps = config.train.num_steps
    none_is_hard = f"no step of train.num_steps={num_steps} has hard masks; make"
    if options.recipe == "sr_ste":
        if options.dense_steps >= num_steps:
            raise ValueError(f"dense_steps={options.dense_steps}: {none_is_hard} it less")
    elif options.dense_steps + options.decay_steps >= num_steps:
        raise ValueError(
            f"decay_steps={options.decay_steps}: with dense_steps={options.dense_steps} "
            f"{none_is_hard} their sum less"
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pattern, from a step on."""

    first_step: int
    pattern: Pattern


def stages(options: Options, target: Pattern) -> list[Stage]:
    """Returns the patterns of a target over training, the dense one first."""
    start, length = options.dense_steps, options.decay_steps
    patterns = _tightening(options.recipe, target)
    each = [
        Stage(start + index * length // len(patterns), pattern)
        for index, pattern in enumerate(patterns)
    ]
    if len(patterns) > 1:
        each.append(Stage(start + length, target))
    dense = [] if start == 0 else [Stage(0, Pattern(target.m, target.m))]
    return dense + each


def _tightening(recipe: str, target: Pattern) -> list[Pattern]:
    """The patterns of the decay phase, for equal times."""
    n, m = target.n, target.m
    if recipe == "sdgf_geometric":
        factors = [2 ** (_GEOMETRIC_STAGES - 1 - i) for i in range(_GEOMETRIC_STAGES)]
        return [Pattern(n * factor, m * factor) for factor in factors]
    if recipe == "sdgf_stepwise":
        halvings = int(math.log2(m / n))
        kept = [m - 1, *(m // 2**i for i in range(1, halvings + 1))]
        return [Pattern(max(n, k), m) for k in kept]
    return [target]


def pruned_factor(options: Options, step: Any) -> Any:
    """Returns beta at a step: what remains of a dropped weight."""
    since = jnp.maximum(step - options.dense_steps, 0)
    is_decaying = since < options.decay_steps
    rate = options.decay_rate
    if options.recipe == "mdgf_linear":
        rate = 1 / options.decay_steps if rate is None else rate
        return jnp.where(is_decaying, jnp.maximum(1 - rate * since, 0.0), 0.0)
    if options.recipe == "mdgf_exponential":
        rate = math.log(1000) / options.decay_steps if rate is None else rate
        return jnp.where(is_decaying, jnp.exp(-rate * since), 0.0)
    return jnp.zeros_like(since, jnp.float32)


def effective(
    weight: Float[Array, "*S"],
    kept: Bool[Array, "*S"],
    factor: Any,
    pruned_grad: str,
) -> Float[Array, "*S"]:
    """Returns W (m + (1 - m) beta), with the gradient that an option of `Options` names."""
    faded = weight * jnp.asarray(factor, weight.dtype)
    if pruned_grad == "scaled":
        return jnp.where(kept, weight, faded)
    if pruned_grad == "blocked":
        return jnp.where(kept, weight, jax.lax.stop_gradient(faded))
    value = jax.lax.stop_gradient(jnp.where(kept, weight, faded))
    return value + (weight - jax.lax.stop_gradient(weight))  # adds 0, and its gradient


def mask_at(
    options: Options, weight: Float[Array, "*S"], target: Target, step: Any
) -> Bool[Array, "*S"]:
    """Returns the mask of a weight by the pattern of a step."""
    assert target.pattern is not None
    each = stages(options, target.pattern)
    scores, now = jnp.abs(weight), _stage(each, step)
    sizes = {stage.pattern.m for stage in each}
    if len(sizes) == 1:
        n = jnp.array([stage.pattern.n for stage in each])[now]
        return nm.mask(scores, n, sizes.pop(), target.axis)

    def of_stage(pattern: Pattern) -> Any:
        return lambda scores: nm.mask(scores, pattern.n, pattern.m, target.axis)

    return jax.lax.switch(now, [of_stage(stage.pattern) for stage in each], scores)


def _stage(each: list[Stage], step: Any) -> Int[Array, ""]:
    """Which stage a step is in."""
    starts = jnp.array([stage.first_step for stage in each])
    return jnp.sum(starts <= step) - 1


class Method(WeightSparsity):
    """Progressive Gradient Flow and SR-STE."""

    variables = {"mask": Mask}

    @property
    def follows_weights(self) -> bool:
        """True: the phase of the step chooses the masks."""
        return True

    @property
    def resets_moments(self) -> bool:
        """As the option `moments` says."""
        return self.options.moments == "reset"

    def largest_group(self, pattern: Pattern) -> int:
        """Returns the largest of all stages."""
        return max(stage.pattern.m for stage in stages(self.options, pattern))

    def init(self, weight: Any, target: Target, key: Any, prior: Any) -> State:
        """Returns the first step's mask."""
        return {"mask": mask_at(self.options, weight, target, 0)}

    def apply(self, weight: Any, state: State, target: Target, step: Any, key: Any) -> Applied:
        """Returns the weight with what its mask drops faded, and SR-STE's decay of that."""
        options, kept = self.options, state["mask"]
        is_sr_ste = options.recipe == "sr_ste"
        factor = pruned_factor(options, jnp.asarray(step))
        pruned_grad = "straight_through" if is_sr_ste else options.pruned_grad
        losses = {}
        if is_sr_ste and not options.sr_ste_decoupled:
            dropped = jnp.where(kept, 0.0, weight.astype(jnp.float32))
            losses["sr_ste"] = options.sr_ste_weight / 2 * jnp.sum(jnp.square(dropped))
        diagnostics = {
            "weight_density": jnp.mean(kept, dtype=jnp.float32),
            "pruned_factor": factor,
        }
        return Applied(effective(weight, kept, factor, pruned_grad), losses, diagnostics)

    def update(
        self,
        old: Any,
        weight: Any,
        state: State,
        target: Target,
        step: Any,
        learning_rate: Any,
    ) -> tuple[Any, State]:
        """Returns the weight, less SR-STE's decay if that is decoupled, and the next mask."""
        options, kept = self.options, state["mask"]
        if options.recipe == "sr_ste" and options.sr_ste_decoupled:
            decay = (learning_rate * options.sr_ste_weight).astype(weight.dtype)
            weight = jnp.where(kept, weight, weight - decay * weight)
        assert target.pattern is not None
        each = stages(options, target.pattern)
        is_due = (step % options.mask_every == 0) | (_stage(each, step) != _stage(each, step - 1))
        new = jax.lax.cond(
            is_due, lambda: mask_at(options, weight, target, step), lambda: state["mask"]
        )
        return weight, {"mask": new}

    def kept(self, weight: Any, state: State, target: Target) -> Any:
        """Returns the mask of the last step."""
        return state["mask"]

    def training_density(self, pattern: Pattern, steps: np.ndarray) -> np.ndarray:
        """Returns 1 while dropped weights count or take gradients, else a stage's density."""
        options = self.options
        each = stages(options, pattern)
        starts = np.array([stage.first_step for stage in each])
        of_stage = np.array([stage.pattern.density for stage in each])
        density = of_stage[np.searchsorted(starts, steps, side="right") - 1]
        # A number beside 0 that is too small to tell from it still costs a product.
        since = steps - options.dense_steps
        fades = options.is_mask_decay & (since < options.decay_steps)
        if options.recipe == "mdgf_linear" and options.decay_rate is not None:
            fades &= since * options.decay_rate < 1
        products = np.where(fades, 1.0, density)
        goes_through = options.recipe == "sr_ste" or options.pruned_grad == "straight_through"
        of_weight = {
            "scaled": products,
            "blocked": density,
            "straight_through": np.ones_like(density),
        }["straight_through" if goes_through else options.pruned_grad]
        return (2 * products + of_weight) / 3
