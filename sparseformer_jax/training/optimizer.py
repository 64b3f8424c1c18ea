"""Learning-rate schedules and optimisers, from optax."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import nnx
from ml_collections import ConfigDict

# In the metadata of a variable that has an optimiser of its own.
_MULTIPLIER = "learning_rate_multiplier"


def make_schedule(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step alone.

    A linear warm-up to the peak, then "cosine" (falling to `final_fraction` of it at
    `num_steps`), "constant", or "wsd": stable until the last `decay_steps`, then a
    straight line down to `final_fraction` (Hu et al. 2024, MiniCPM, section 4).
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    final = peak * optimizer.final_fraction
    pieces = {
        "constant": [(optax.constant_schedule(peak), None)],
        "cosine": [
            (
                optax.cosine_decay_schedule(
                    peak, max(1, num_steps - warmup), optimizer.final_fraction
                ),
                None,
            )
        ],
        "wsd": [
            (optax.constant_schedule(peak), num_steps - optimizer.decay_steps),
            (optax.linear_schedule(peak, final, optimizer.decay_steps), None),
        ],
    }[optimizer.schedule]
    if warmup:
        # Step 0 already moves: the ramp ends at the peak on step `warmup`.
        pieces = [(optax.linear_schedule(peak / (warmup + 1), peak, warmup), warmup), *pieces]
    schedules = [schedule for schedule, _ in pieces]
    return optax.join_schedules(schedules, [end for _, end in pieces if end is not None])


def make_optimizer(
    optimizer: ConfigDict, num_steps: int, variables: Mapping[str, nnx.Variable]
) -> optax.GradientTransformation:
    """Returns AdamW, or Muon with AdamW for what is no matrix, for trainable variables.

    Weight decay acts on projection kernels only. Muon (Jordan et al. 2024) is scaled to
    AdamW's update size, 0.2 sqrt(max(in, out)), so both take the same learning rates
    (Liu et al. 2025, section 2.2). What a method of sparsity trains beside weights has an AdamW
    of its own, whose weight decay and share of the learning rate the method says. Clipping is
    the trainer's.
    """
    own = {n: v.get_metadata() for n, v in variables.items() if _MULTIPLIER in v.get_metadata()}
    weights = {name: v for name, v in variables.items() if name not in own}
    if not own:
        return _of_weights(optimizer, num_steps, weights)
    optimizers, labels = {}, dict.fromkeys(weights, "weights")
    if weights:
        optimizers["weights"] = _of_weights(optimizer, num_steps, weights)
    for name, group in own.items():
        multiplier, weight_decay = group[_MULTIPLIER], group["weight_decay"]
        labels[name] = f"rate x {multiplier}, decay {weight_decay}"
        optimizers[labels[name]] = _adamw(
            optimizer, num_steps, weight_decay=weight_decay, multiplier=multiplier
        )
    return optax.partition(optimizers, labels)


def _adamw(
    optimizer: ConfigDict,
    num_steps: int,
    *,
    weight_decay: float,
    multiplier: float = 1.0,
    mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    schedule = make_schedule(optimizer, num_steps)
    return optax.adamw(
        schedule if multiplier == 1 else lambda step: multiplier * schedule(step),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=weight_decay,
        mask=mask,
    )


def _of_weights(
    optimizer: ConfigDict, num_steps: int, variables: Mapping[str, nnx.Variable]
) -> optax.GradientTransformation:
    is_matrix = {name: "in_dims" in v.get_metadata() for name, v in variables.items()}
    adamw = _adamw(
        optimizer,
        num_steps,
        weight_decay=optimizer.weight_decay,
        mask=lambda params: {name: is_matrix.get(name, False) for name in params},
    )
    if optimizer.name == "adamw":
        return adamw
    schedule = make_schedule(optimizer, num_steps)
    # optax's Muon would give the other parameters Nesterov momentum, so AdamW is our own.
    axes = {name: _matrix_axes(variables[name]) for name, matrix in is_matrix.items() if matrix}
    muon = optax.contrib.muon(
        schedule,
        beta=optimizer.momentum,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={
            name: axes.get(name, optax.MaskedNode()) for name in variables
        },
    )
    labels = {name: "muon" if matrix else "adamw" for name, matrix in is_matrix.items()}
    return optax.partition({"muon": muon, "adamw": adamw}, labels)


def _matrix_axes(variable: nnx.Variable) -> optax.contrib.MuonDimensionNumbers:
    """Input and output dimensions of a projection kernel, after the stacked layers."""
    first = variable.ndim - len(variable.get_metadata("axes"))
    middle = first + variable.get_metadata("in_dims")
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(first, middle)), tuple(range(middle, variable.ndim))
    )
