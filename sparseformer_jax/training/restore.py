"""States as checkpoints hold them, by the names of layers, and the way back from there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.layer_names import LayerNames, Tree
from sparseformer_jax.training.state import ModelDef, TrainState, place

# Names shown of those that do not fit.
_SHOWN = 4


def saved_form(model_def: ModelDef, state: TrainState) -> dict[str, Any]:
    """Returns a state as it is saved: an array a layer, in the host's memory.

    The devices hold a copy of no more than one stacked array at a time.
    """
    return model_def.names.split(vars(state), put=_to_host)


def restore_train_state(
    model_def: ModelDef, checkpoints: Checkpoints, step: int, abstract: TrainState
) -> TrainState:
    """Returns the state of a step, in the shapes, dtypes and shardings asked for.

    Raises:
      ValueError: there is no such step, or its arrays are not those of the model.
    """
    return TrainState(**_read(model_def, checkpoints, step, vars(abstract)))


def restore_state(model_def: ModelDef, workdir: Path, step: int | None = None) -> TrainState:
    """Returns what a model is made of, without an optimiser, sharded over the current mesh.

    Args:
      model_def: the model the run trains.
      workdir: of the run.
      step: which checkpoint; None: the newest.

    Raises:
      ValueError: there is no such checkpoint, or it does not fit the model.
    """
    workdir = Path(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"--workdir={workdir} holds no checkpoints; train there first")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None:
            raise ConfigError(f"--workdir={workdir} holds no complete checkpoint yet")
        params, variables = model_def.abstract(jax.sharding.get_mesh())
        asked = {"params": params, "variables": variables}
        items = _read(model_def, checkpoints, step, asked)
        return TrainState(jnp.asarray(step, jnp.int32), **items)


def _read(
    model_def: ModelDef, checkpoints: Checkpoints, step: int, asked: dict[str, Any]
) -> dict[str, Any]:
    """Reads items of a state, in the form of today or in the one before names by layer."""
    device_mesh = jax.sharding.get_mesh()
    layers = place(jax.eval_shape(model_def.to_layers, asked), device_mesh)
    held = checkpoints.arrays(step)
    stacked = None
    if LayerNames.are_stacked(held):
        stacked = LayerNames({name: array.shape for name, array in held.items()})
        held = jax.eval_shape(stacked.split, held)
    wrong = differences(held, {**layers["params"], **layers["variables"]})
    if wrong:
        raise ConfigError(
            f"checkpoint {step} in {checkpoints.directory} does not fit the config: {wrong}"
        )
    if stacked is None:
        found = checkpoints.restore(step, _on_host(layers))
    else:
        old = place(jax.eval_shape(stacked.stack, layers), device_mesh)
        del old["variables"]  # there were none
        found = stacked.split(checkpoints.restore(step, old)) | {"variables": {}}
    stacked_again = model_def.names.stack(found, put=_to_device)
    return jax.device_put(stacked_again, jax.tree.map(lambda leaf: leaf.sharding, asked))


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Returns in one line which arrays are missing, left over or of other shapes; "": none.

    Args:
      held: what is there, by name; only shape and dtype count.
      wanted: what is asked for.
    """
    missing = [name for name in wanted if name not in held]
    left_over = [name for name in held if name not in wanted]
    misshapen = [
        f"{name} is {_form(held[name])} instead of {_form(array)}"
        for name, array in wanted.items()
        if name in held and _form(held[name]) != _form(array)
    ]
    lists = {"missing": missing, "left over": left_over, "misshapen": misshapen}
    return "; ".join(f"{what}: {_first(names)}" for what, names in lists.items() if names)


def _form(array: Any) -> str:
    return f"{jnp.dtype(array.dtype).name}{list(array.shape)}"


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


def _on_host(abstract: Tree) -> Tree:
    def on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(on_host, abstract)
