"""Starts a run with the parameters of another one, by the names of layers."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training import weight_sparsity
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.masks import check_patterns, priors, split_source
from sparseformer_jax.training.restore import Stored, differences, first_names
from sparseformer_jax.training.state import ModelDef, Params, TrainState, init_state, new_state

# What a token means.
_TOKENS = ("data.tokenizer", "data.bos_token", "data.eos_token")


def first_state(
    model_def: ModelDef, optimizer: optax.GradientTransformation, key: jax.Array
) -> tuple[TrainState, list[str]]:
    """Returns the state before the first step, and lines that tell where it comes from.

    With `init_from` parameters and variables are those of another run, on whatever mesh it
    ran; what the method adds to dense attention and the other run has in no layer is
    initialised.

    Raises:
      ConfigError: there is no such checkpoint, anything else is missing, left over or of
        another shape, weights are to have masks that nothing gives, or masks that stay are not
        of their patterns.
    """
    config = model_def.config
    source = config.init_from
    given = priors(model_def)
    if not source:
        _check_given(model_def, model_def.targets, given)
        fresh = jax.jit(lambda priors: init_state(model_def, optimizer, key, priors))
        return fresh(given), []
    workdir, step = split_source(source)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"init_from={source!r}: {workdir} holds no checkpoints")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None:
            raise ConfigError(f"init_from={source!r}: {workdir} holds no complete checkpoint")
        (params, variables), new = _load(model_def, Stored(checkpoints, step), key)
        other = config_lib.completed(config_lib.from_json(checkpoints.meta(step).config))
    others = _other_settings(other, config)
    note = f"parameters start from step {step} of {workdir}"
    if new:
        names = [name for name in (config.attention.name, config.sparsity.name) if name != "none"]
        note += f"; of {' and '.join(names)} itself, initialised: {first_names(new)}"
    if others:
        note += f"; they were trained with other settings: {'; '.join(others)}"
    method = model_def.sparsity
    masked = [
        name
        for name in model_def.targets
        if name in given
        or method.follows_weights
        or not set(new).isdisjoint(_state_of(model_def, name))
    ]
    _check_given(model_def, masked, given)
    if len(masked) < len(model_def.targets) and not method.keeps_prior:
        _check_targets(other, config)
    if method.keeps_prior:
        masks = model_def.masks({**params, **variables})
        taken = {name: kept for name, kept in masks.items() if name not in masked}
        check_patterns(model_def, taken, f"init_from={source!r}")

    def start(params: Params, variables: Params, priors: Params) -> TrainState:
        started = weight_sparsity.start(model_def, params, variables, key, priors, masked)
        return new_state(model_def, optimizer, *started)

    return jax.jit(start)(params, variables, given), [note]


def _check_given(model_def: ModelDef, names: Iterable[str], given: Mapping[str, Any]) -> None:
    """Refuses weights that are sparse by no pattern and by no mask."""
    for name in names:
        if model_def.targets[name].pattern is None and name not in given:
            targets, weight = model_def.config.sparsity.targets, model_def.names.of(name)[0]
            raise ConfigError(
                f"sparsity.targets={','.join(targets)!r}: {weight} has no pattern and no mask;"
                " write NAMES=n:m, or name a run with masks as sparsity.prior or init_from"
            )


def _check_targets(other: ConfigDict, config: ConfigDict) -> None:
    """Refuses state of other patterns, whose arrays may have the same shapes: 1:4 and 3:4."""
    theirs, ours = other.sparsity.targets, config.sparsity.targets
    if theirs != ours:
        raise ConfigError(
            f"sparsity.targets={','.join(ours)!r}: init_from={config.init_from!r} has learned "
            f"{','.join(theirs)!r}; take these, or start from its masks by sparsity.prior"
        )


def _state_of(model_def: ModelDef, name: str) -> list[str]:
    """The names by layer of a sparse weight's state."""
    paths = model_def.sparsity.state_names(name).values()
    return [layer for path in paths for layer in model_def.names.of(path)]


def _other_settings(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns what no shape tells: settings of the model and its tokens, as "key: old -> new"."""
    return [
        f"{key}: {change}"
        for key, change in config_lib.diff(old, new).items()
        if key in _TOKENS or (key.startswith("model.") and key != "model.remat")
    ]


def _load(model_def: ModelDef, stored: Stored, key: jax.Array) -> tuple[Any, list[str]]:
    """Returns parameters and variables, and the names of those that are new."""
    asked = model_def.abstract(jax.sharding.get_mesh())
    layers = model_def.abstract_layers(asked)
    wanted = {**layers[0], **layers[1]}
    new = _new_names(model_def.config, wanted, stored)
    wrong = differences(stored.arrays, {n: x for n, x in wanted.items() if n not in new})
    if wrong:
        source = model_def.config.init_from
        raise ConfigError(f"init_from={source!r}: does not fit the model: {wrong}")
    params, variables = ({n: x for n, x in part.items() if n not in new} for part in layers)
    loaded = stored.load({"params": params, "variables": variables})

    def fresh() -> tuple[dict[str, Any], ...]:
        drawn = model_def.to_layers(model_def.init(key))
        return tuple({n: x for n, x in part.items() if n in new} for part in drawn)

    parts = zip((loaded["params"], loaded["variables"]), jax.jit(fresh)(), strict=True)
    return model_def.placed(tuple(held | drawn for held, drawn in parts), asked), new


def _new_names(config: ConfigDict, wanted: dict[str, Any], stored: Stored) -> list[str]:
    """What the methods add to a dense model and the other run has in no layer."""
    dense = config.copy_and_resolve_references()
    dense.attention = registry.method_config("attention", "dense")
    dense.sparsity = registry.method_config("sparsity", "none")
    dense.train.trainable = "all"
    base = ModelDef(dense)
    shared = {layer for name in (*base.params, *base.variables) for layer in base.names.of(name)}
    known = {_within_layer(name) for name in stored.arrays}
    return [n for n in wanted if n not in shared and _within_layer(n) not in known]


def _within_layer(name: str) -> str:
    return re.sub(r"^layers/\d+/", "", name)
