"""Masks of other runs, from which sparsity starts."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparseformer_jax import config as config_lib
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.sparsity import nm
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.restore import differences, restore_state
from sparseformer_jax.training.state import ModelDef


def split_source(source: str) -> tuple[Path, int | None]:
    """Splits WORKDIR or WORKDIR:STEP."""
    match = re.fullmatch(r"(.+):(\d+)", source)
    return (Path(match[1]), int(match[2])) if match else (Path(source), None)


def masks_of_run(workdir: Path, step: int | None = None) -> dict[str, jax.Array]:
    """Returns the hard masks of a run by the names of weights, layer by layer, on the mesh.

    Raises:
      ConfigError: there is no such checkpoint, or no weight of it is sparse.
    """
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"{workdir} holds no checkpoints")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None:
            raise ConfigError(f"{workdir} holds no complete checkpoint")
        config = config_lib.completed(config_lib.from_json(checkpoints.meta(step).config))
    model_def = ModelDef(config)
    if not model_def.targets:
        raise ConfigError(f"{workdir} is a dense checkpoint: it has no masks")
    state = restore_state(model_def, workdir, step)
    masks = jax.jit(lambda params, variables: model_def.masks({**params, **variables}))
    return model_def.to_layers(masks(state.params, state.variables))


def priors(model_def: ModelDef) -> dict[str, Any]:
    """Returns the masks that a config's sparsity starts from, by the names of stacked weights.

    Raises:
      ConfigError: `sparsity.prior` names no run with masks of all these weights, or masks that
        are to stay are not of their patterns.
    """
    source = model_def.sparsity.prior_run
    if not source:
        return {}
    try:
        masks = masks_of_run(*split_source(source))
    except ValueError as error:
        raise ConfigError(
            f"sparsity.prior={source!r}: takes a run with masks, as of `python -m "
            f"sparseformer_jax.sparsity prune`; {error}"
        ) from None
    wanted = {
        layer: jax.ShapeDtypeStruct(model_def.layer_shape(name), bool)
        for name in model_def.targets
        for layer in model_def.names.of(name)
    }
    masks = {name: kept for name, kept in masks.items() if name in wanted}
    if wrong := differences(masks, wanted):
        raise ConfigError(
            f"sparsity.prior={source!r}: does not fit the model: {wrong}; take masks that the same "
            "model has for all of sparsity.targets"
        )
    stacked = model_def.from_layers(masks)
    if model_def.sparsity.keeps_prior:
        check_patterns(model_def, stacked, f"sparsity.prior={source!r}")
    return stacked


@functools.partial(jax.jit, static_argnums=1)
def _holds(kept: jax.Array, target: Target) -> jax.Array:
    assert target.pattern is not None
    grouped = nm.groups(kept, target.pattern.m, target.axis)
    return jnp.all(jnp.sum(grouped, axis=target.axis) == target.pattern.n)


def check_patterns(model_def: ModelDef, masks: Mapping[str, jax.Array], source: str) -> None:
    """Refuses masks that do not keep n of every m, where a target says so.

    Args:
      model_def: of the model.
      masks: by the names of stacked weights.
      source: the setting that they come from, with its value.

    Raises:
      ConfigError: one does not.
    """
    for name, kept in masks.items():
        target = model_def.targets[name]
        if target.pattern is not None and not _holds(kept, target):
            weight = model_def.names.of(name)[0]
            raise ConfigError(
                f"{source}: its mask of {weight} is not {target.pattern}, which "
                "sparsity.targets asks for; leave the pattern out to take masks as they are"
            )
