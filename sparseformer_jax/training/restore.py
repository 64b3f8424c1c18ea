"""States as checkpoints hold them, by the names of layers, and the way back from there."""

import contextlib
from collections.abc import Iterator, Mapping
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
    with _opened(workdir, step) as (checkpoints, step):
        params, variables = model_def.abstract(jax.sharding.get_mesh())
        asked = {"params": params, "variables": variables}
        items = _read(model_def, checkpoints, step, asked)
        return TrainState(jnp.asarray(step, jnp.int32), **items)


def restore_layers(
    model_def: ModelDef, workdir: Path, step: int | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Returns the step, and "params" and "variables" by layer, in the host's memory.

    Raises:
      ValueError: there is no such checkpoint, or it does not fit the model.
    """
    with _opened(workdir, step) as (checkpoints, step):
        params, variables = model_def.abstract(jax.sharding.get_mesh())
        layers = model_def.abstract_layers({"params": params, "variables": variables})
        return step, _fitting(checkpoints, step, layers).load(layers)


@contextlib.contextmanager
def _opened(workdir: Path, step: int | None) -> Iterator[tuple[Checkpoints, int]]:
    """The checkpoints of a run, and the step asked for, or the newest."""
    workdir = Path(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"--workdir={workdir} holds no checkpoints; train there first")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None:
            raise ConfigError(f"--workdir={workdir} holds no complete checkpoint yet")
        yield checkpoints, step


def _read(
    model_def: ModelDef, checkpoints: Checkpoints, step: int, asked: dict[str, Any]
) -> dict[str, Any]:
    """Reads items of a state, all variables among them."""
    layers = model_def.abstract_layers(asked)
    return model_def.placed(_fitting(checkpoints, step, layers).load(layers), asked)


def _fitting(checkpoints: Checkpoints, step: int, layers: dict[str, Any]) -> "Stored":
    """A checkpoint whose parameters and variables are those asked for, by layer."""
    stored = Stored(checkpoints, step)
    wrong = differences(stored.arrays, {**layers["params"], **layers["variables"]})
    if wrong:
        raise ConfigError(
            f"checkpoint {step} in {checkpoints.directory} does not fit the config: {wrong}"
        )
    return stored


class Stored:
    """A checkpoint by the names of layers, also one that was written before there were any.

    Attributes:
      arrays: shapes and dtypes of its parameters and variables.

    Raises:
      ValueError: there is no such step.
    """

    def __init__(self, checkpoints: Checkpoints, step: int) -> None:
        self._checkpoints, self._step = checkpoints, step
        self.arrays = checkpoints.arrays(step)
        self._stacked = None
        if LayerNames.are_stacked(self.arrays):
            self._stacked = LayerNames({name: x.shape for name, x in self.arrays.items()})
            self.arrays = jax.eval_shape(self._stacked.split, self.arrays)

    def load(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Returns items of a state by the names of layers, in the host's memory.

        Raises:
          ValueError: it cannot be read.
        """
        if self._stacked is None:
            return self._checkpoints.restore(self._step, _on_host(layers))
        old = place(jax.eval_shape(self._stacked.stack, layers), jax.sharding.get_mesh())
        del old["variables"]  # there were none
        return self._stacked.split(self._checkpoints.restore(self._step, old)) | {"variables": {}}


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
    return "; ".join(f"{what}: {first_names(names)}" for what, names in lists.items() if names)


def _form(array: Any) -> str:
    return f"{jnp.dtype(array.dtype).name}{list(array.shape)}"


def first_names(names: list[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def _on_host(abstract: Tree) -> Tree:
    def on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(on_host, abstract)
