"""Learning-rate schedules and optimisers, from optax."""

from collections.abc import Callable, Iterable, Mapping
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
    optimizers: dict[str, optax.GradientTransformation] = {}
    labels = {name: _label(optimizer.name, v) for name, v in variables.items()}
    for name, variable in variables.items():
        metadata = variable.get_metadata()
        if _MULTIPLIER in metadata:
            rate, decay = metadata[_MULTIPLIER], metadata["weight_decay"]
            optimizers[labels[name]] = _adamw(optimizer, num_steps, decay, multiplier=rate)
    is_matrix = {name: "in_dims" in v.get_metadata() for name, v in variables.items()}
    if "adamw" in labels.values():
        optimizers["adamw"] = _adamw(
            optimizer,
            num_steps,
            optimizer.weight_decay,
            mask=lambda params: {name: is_matrix[name] for name in params},
        )
    if "muon" in labels.values():
        matrices = {name: v for name, v in variables.items() if labels[name] == "muon"}
        optimizers["muon"] = _muon(optimizer, num_steps, matrices, variables)
    if len(optimizers) == 1 and optimizer.name == "adamw":
        return next(iter(optimizers.values()))
    return optax.partition(optimizers, labels)


def _label(name: str, variable: nnx.Variable) -> str:
    """Which optimiser a variable has: that of the config, or one of its own."""
    metadata = variable.get_metadata()
    if _MULTIPLIER in metadata:
        return f"rate x {metadata[_MULTIPLIER]}, decay {metadata['weight_decay']}"
    # optax's Muon would give what is no matrix Nesterov momentum, so AdamW is our own.
    return name if "in_dims" in metadata else "adamw"


def _adamw(
    optimizer: ConfigDict,
    num_steps: int,
    weight_decay: float,
    *,
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


def _muon(
    optimizer: ConfigDict,
    num_steps: int,
    matrices: Mapping[str, nnx.Variable],
    names: Iterable[str],
) -> optax.GradientTransformation:
    axes = {name: _matrix_axes(variable) for name, variable in matrices.items()}
    return optax.contrib.muon(
        make_schedule(optimizer, num_steps),
        beta=optimizer.momentum,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={name: axes.get(name, optax.MaskedNode()) for name in names},
    )


def _matrix_axes(variable: nnx.Variable) -> optax.contrib.MuonDimensionNumbers:
    """Input and output dimensions of a projection kernel, after the stacked layers."""
    first = variable.ndim - len(variable.get_metadata("axes"))
    middle = first + variable.get_metadata("in_dims")
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(first, middle)), tuple(range(middle, variable.ndim))
    )
