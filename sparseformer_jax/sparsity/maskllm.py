"""MaskLLM: n:m masks learned by gradients, as a choice among all masks of a group.

    p = softmax((kappa pi + g) / tau)    M = sum_c p_c S_c    W' = M W

over the candidates S of a group, 1100, 1010, 1001, .., with logits pi, Gumbel noise g that every
step draws anew, and kappa and tau that move in a straight line over training. Weights are frozen
as a rule (`train.trainable = "/mask_logits$"`). The loss falls with what is kept,

    - lambda (1 - r) |M W|^2,  r = step / schedule_steps

whose gradient reaches logits only. Evaluation takes the likeliest candidate. Fang et al. 2024,
arXiv 2409.17481, section 3; the fade 1 - r is of the released code.

Logits start as a normal, to which a prior mask is added, of magnitude or of another run:

    pi + (overlap - 1) std(pi) alpha,  overlap: places that candidate and prior share
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key
from ml_collections import ConfigDict

from sparseformer_jax import mesh
from sparseformer_jax.sparsity import nm
from sparseformer_jax.sparsity.base import Applied, State, Target, WeightSparsity
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.sparsity.targets import check_patterns, parse

_OWN_PRIORS = ("magnitude", "none")


class MaskLogits(nnx.Param):
    """Of each candidate mask of each group; gradients move them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of MaskLLM, by default those of the paper.

    Attributes:
      targets: what is sparse: "all=2:4" attention and MLP, "ff=2:4", "qkv=1:4", or a regular
        expression on names; the first that fits a weight counts.
      prior: mask to start from: "magnitude", "none", or WORKDIR or WORKDIR:STEP of a run that has
        masks: of one-shot pruning, or learned ones.
      prior_weight: alpha.
      init_std: of the logits.
      kappa: at the start and at the end: how much logits count beside noise.
      tau: temperature at the start and at the end.
      schedule_steps: in which both move; steps after it have the end's.
      regularizer: lambda.
      regularizer_fades: whether it falls to 0 in the same steps.
      straight_through: whether products see the likeliest candidate, the gradient being that of
        the soft mask.
      learning_rate_multiplier: of logits, times the optimiser's learning rate.
      weight_decay: of logits.

    Raises:
      ValueError: an option is out of its range.
    """

    targets: tuple[str, ...] = ("all=2:4",)
    prior: str = "magnitude"
    prior_weight: float = 3.0
    init_std: float = 0.01
    kappa: tuple[float, ...] = (100.0, 500.0)
    tau: tuple[float, ...] = (4.0, 0.05)
    schedule_steps: int = 2000
    regularizer: float = 1e-5
    regularizer_fades: bool = True
    straight_through: bool = False
    learning_rate_multiplier: float = 1.0
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("kappa", "tau"):
            value = getattr(self, name)
            if len(value) != 2 or min(value) <= 0:
                raise ValueError(f"{name}={value}: must be two positive numbers, start and end")
        if self.schedule_steps < 1:
            raise ValueError(f"schedule_steps={self.schedule_steps}: must be at least 1")
        for name in ("init_std", "learning_rate_multiplier"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("prior_weight", "regularizer", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")


def check(options: Options, config: ConfigDict) -> None:
    """Checks the targets, and that their groups have few enough masks.

    Raises:
      ValueError: a target has no pattern, or one of more than 70 masks a group.
    """
    check_patterns(options.targets)
    for choice in parse(options.targets):
        assert choice.pattern is not None
        try:
            nm.candidates(choice.pattern.n, choice.pattern.m)
        except ValueError as error:
            raise ValueError(f"targets={choice.text!r}: {error}") from None


def progress(options: Options, step: Any) -> Float[Array, ""]:
    """Returns r, the part of the schedule that is done, from 0 to 1."""
    return jnp.minimum(jnp.asarray(step, jnp.float32) / options.schedule_steps, 1.0)


def schedule(options: Options, step: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns kappa and tau of a step."""
    r = progress(options, step)
    kappa, tau = (start + (end - start) * r for start, end in (options.kappa, options.tau))
    return kappa, tau


def add_prior(
    logits: Float[Array, "C *G"], overlap: Float[Array, "C *G"], weight: float
) -> Float[Array, "C *G"]:
    """Returns one layer's logits with a prior: alpha standard deviations a place shared."""
    return logits + (overlap - 1) * jnp.std(logits, ddof=1) * weight


def overlaps(kept: Bool[Array, "*S"], target: Target) -> Float[Array, "C *G"]:
    """Returns how many places each candidate shares with a layer's mask, group by group."""
    table, place = _table(target), kept.ndim + target.axis
    grouped = nm.groups(kept, table.shape[1], target.axis).astype(jnp.float32)
    places = [jax.lax.index_in_dim(grouped, j, place + 1, False) for j in range(table.shape[1])]
    return jnp.stack([sum(x for x, own in zip(places, row, strict=True) if own) for row in table])


def gumbel(key: Key[Array, ""], logits: Float[Array, "*L"]) -> Float[Array, "*L"]:
    """Returns noise -log(-log U) of the shape of logits, the same on every mesh."""
    out_sharding = jax.typeof(logits).sharding if mesh.is_active() else None
    least = jnp.finfo(jnp.float32).tiny
    uniform = jax.random.uniform(
        key, logits.shape, minval=least, maxval=1.0, out_sharding=out_sharding
    )
    return -jnp.log(-jnp.log(uniform))


def soft_mask(probabilities: Sequence[Float[Array, "*G"]], target: Target) -> Float[Array, "*S"]:
    """Returns sum_c p_c S_c, of the weight's shape; each group adds up to n."""
    table, place = _table(target), probabilities[0].ndim + target.axis
    entries = [
        sum(x for x, row in zip(probabilities, table, strict=True) if row[j])
        for j in range(table.shape[1])
    ]
    return nm.ungroup(jnp.stack(entries, axis=place + 1), target.axis)


def likeliest(logits: Sequence[Float[Array, "*G"]]) -> list[Float[Array, "*G"]]:
    """Returns 1 for the largest logit of each group, the first of equal ones, and 0 elsewhere."""
    best = jnp.argmax(jnp.stack(logits), axis=0)
    return [(best == c).astype(x.dtype) for c, x in enumerate(logits)]


def by_candidate(logits: Float[Array, "*L"], target: Target) -> list[Float[Array, "*G"]]:
    """Returns the logits of each candidate, of all layers there are."""
    front = logits.ndim - target.ndim - 1
    return [jax.lax.index_in_dim(logits, c, front, False) for c in range(logits.shape[front])]


def _softmax(logits: Sequence[Float[Array, "*G"]]) -> list[Float[Array, "*G"]]:
    """Softmax over a list: one pass over memory, where XLA makes several of an axis's reductions.

    A step of SmolLM2 on two CPU cores makes its masks and their gradient in 1.5 s for 5.8 s.
    """
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, logits))
    terms = [jnp.exp(x - largest) for x in logits]
    scale = 1 / functools.reduce(jnp.add, terms)
    return [x * scale for x in terms]


def _table(target: Target) -> np.ndarray:
    assert target.pattern is not None
    return nm.candidates(target.pattern.n, target.pattern.m)


class Method(WeightSparsity):
    """MaskLLM."""

    variables = {"mask_logits": MaskLogits}
    mask_itemsize = 4

    @property
    def prior_run(self) -> str:
        """The run whose masks the logits start from."""
        return "" if self.options.prior in _OWN_PRIORS else self.options.prior

    def optimizer_group(self, name: str) -> dict[str, float]:
        """Returns what the options say of logits."""
        return {
            "learning_rate_multiplier": self.options.learning_rate_multiplier,
            "weight_decay": self.options.weight_decay,
        }

    def init(self, weight: Any, target: Target, key: Any, prior: Any) -> State:
        """Returns logits that lean to the prior."""
        options, table = self.options, _table(target)
        n, m = int(table[0].sum()), table.shape[1]
        shape = list(weight.shape)
        shape[target.axis] //= m
        logits = options.init_std * jax.random.normal(key, (len(table), *shape))
        if prior is None and options.prior == "magnitude":
            prior = nm.mask(jnp.abs(weight), n, m, target.axis)
        if prior is not None:
            logits = add_prior(logits, overlaps(prior, target), options.prior_weight)
        return {"mask_logits": logits}

    def apply(self, weight: Any, state: State, target: Target, step: Any, key: Any) -> Applied:
        """Returns the weight times a soft mask, and the regulariser."""
        logits = state["mask_logits"]
        return self.sampled(weight, logits, gumbel(key, logits), target, step)

    def sampled(self, weight: Any, logits: Any, noise: Any, target: Target, step: Any) -> Applied:
        """Returns what `apply` makes of the noise that it draws."""
        options = self.options
        kappa, tau = schedule(options, step)
        scaled = by_candidate((kappa * logits + noise) / tau, target)
        probabilities = _softmax(scaled)
        confidence = jnp.mean(functools.reduce(jnp.maximum, probabilities))
        if options.straight_through:
            # Adds 0, and its gradient: masks are exact.
            soft = [x - jax.lax.stop_gradient(x) for x in probabilities]
            probabilities = [x + own for x, own in zip(likeliest(scaled), soft, strict=True)]
        mask = soft_mask(probabilities, target)
        losses = {}
        if options.regularizer:
            kept = jax.lax.stop_gradient(weight.astype(jnp.float32)) * mask
            fade = 1 - progress(options, step) if options.regularizer_fades else 1.0
            losses["mask_regularizer"] = -options.regularizer * fade * jnp.sum(jnp.square(kept))
        return Applied(weight * mask.astype(weight.dtype), losses, {"mask_confidence": confidence})

    def kept(self, weight: Any, state: State, target: Target) -> Any:
        """Returns the likeliest candidates."""
        return soft_mask(likeliest(by_candidate(state["mask_logits"], target)), target) > 0.5

    def training_density(self, pattern: Pattern, steps: np.ndarray) -> np.ndarray:
        """Returns 1: soft masks drop nothing, and logits need the gradient of every weight."""
        return np.ones(len(steps))
