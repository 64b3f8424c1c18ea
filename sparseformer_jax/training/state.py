"""The train state, and the bridge between an NNX model and its flat variables."""

import dataclasses
import re
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sparseformer_jax import mesh
from sparseformer_jax.build import make_model
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.model.transformer import Transformer
from sparseformer_jax.training.layer_names import LayerNames

Tree = TypeVar("Tree")

# Variables of a model, array or abstract, by their paths, stacked as they scan, e.g.
# "stacks/0/unit/0/attention/query/kernel"; `ModelDef.to_layers` names them by layer.
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, apart from the position in the data; arrays or abstract.

    Attributes:
      step: optimiser steps done.
      params: every `nnx.Param` of the model, frozen ones too.
      variables: every other variable its modules own; no gradient moves them.
      opt_state: of the trainable parameters only; None in evaluation.
    """

    step: Any
    params: Params
    variables: Params
    opt_state: Any = None


class ModelDef:
    """What is static about a config's model: structure, names and logical axes.

    Attributes:
      config: the config it was made from.
      params: name -> abstract `nnx.Param` with its metadata.
      variables: the same of every other variable.
    """

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        self._marks: list[Hashable] | None = None
        self._trace()
        marks = self._trainable_marks()
        if len(set(marks)) > 1:
            # What only some layers train, they get stacks of their own for.
            self._marks = marks
            self._trace()

    def _trace(self) -> None:
        """Takes structure and names from the model, without making an array."""
        model = nnx.eval_shape(lambda: make_model(self.config, marks=self._marks, rngs=nnx.Rngs(0)))
        self._graphdef, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        self._paths = {"/".join(map(str, path)): path for path in flat}
        named = {name: flat[path] for name, path in self._paths.items()}
        for name, variable in named.items():
            _check_variable(name, variable)
        self.params: dict[str, nnx.Variable] = {
            name: v for name, v in named.items() if issubclass(v.type, nnx.Param)
        }
        self.variables: dict[str, nnx.Variable] = {
            name: v for name, v in named.items() if name not in self.params
        }
        self.names = LayerNames({name: v.shape for name, v in named.items()})

    def to_layers(self, tree: Tree) -> Tree:
        """Returns a tree by the names of layers: "layers/7/attention/query/kernel".

        Whatever dictionary in the tree has names of variables as keys gets an entry a layer.
        """
        return self.names.split(tree)

    def abstract_layers(self, tree: Tree) -> Tree:
        """Returns `to_layers` of an abstract tree, on the current mesh."""
        return place(jax.eval_shape(self.to_layers, tree), jax.sharding.get_mesh())

    def placed(self, layers: Tree, abstract: Tree) -> Tree:
        """Returns `from_layers` of arrays in the host's memory, in the places of `abstract`.

        They come to the devices one stack at a time, which need no second copy of the state.
        """
        stacked = self.names.stack(layers, put=_to_device)
        return jax.device_put(stacked, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    def from_layers(self, tree: Tree) -> Tree:
        """Returns the tree that `to_layers` was given."""
        return self.names.stack(tree)

    def model(
        self, params: Mapping[str, Any], variables: Mapping[str, Any], step: Any
    ) -> Transformer:
        """Returns the model as it is at a step: the one way from a state to a model."""
        values = {**params, **variables}
        flat = [(path, values[name]) for name, path in self._paths.items()]
        model = nnx.merge(self._graphdef, nnx.from_flat_state(flat))
        model.step = step
        return model

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Returns fresh parameters and other variables, sharded over the current mesh."""

        def init(key: jax.Array) -> Params:
            model = make_model(self.config, marks=self._marks, rngs=nnx.Rngs(key))
            state = nnx.as_pure(nnx.state(model))
            flat = dict(nnx.to_flat_state(state))
            return {name: flat[path] for name, path in self._paths.items()}

        # Automatic axes let the partitioner draw each shard's numbers where they belong.
        specs = {name: self.spec(name) for name in self._paths}
        return self._split(jax.jit(jax.sharding.auto_axes(init, out_sharding=specs))(key))

    def spec(self, name: str) -> PartitionSpec:
        """Returns the partition of a variable; stacked layers have a leading axis more."""
        variable = self.params.get(name) or self.variables[name]
        axes = variable.get_metadata("axes")
        return mesh.spec(*(None,) * (variable.ndim - len(axes)), *axes)

    def layer_axes(self, name: str) -> tuple[int, ...]:
        """Returns the axes of a variable that are one layer's: all but that of the stack."""
        variable = self.params.get(name) or self.variables[name]
        return tuple(range(variable.ndim - len(variable.get_metadata("axes")), variable.ndim))

    def abstract(self, device_mesh: jax.sharding.Mesh) -> tuple[Params, Params]:
        """Returns shapes, dtypes and shardings of the parameters and other variables."""
        named = {**self.params, **self.variables}
        return self._split(
            {name: _placed(v, self.spec(name), device_mesh) for name, v in named.items()}
        )

    def _split(self, values: Params) -> tuple[Params, Params]:
        return (
            {name: values[name] for name in self.params},
            {name: values[name] for name in self.variables},
        )

    def trainable(self) -> list[str]:
        """Returns the parameters that `train.trainable` selects, by their names by layer.

        Raises:
          ValueError: it selects nothing.
        """
        names = [name for name in self.params if self._selects(self.names.of(name)[0])]
        if not names:
            pattern = self.config.train.trainable
            known = [layer for name in self.params for layer in self.names.of(name)]
            shown = ", ".join(sorted(known)[:8])
            raise ConfigError(f"train.trainable={pattern!r} matches no parameter; some are {shown}")
        return names

    def _selects(self, name: str) -> bool:
        pattern = self.config.train.trainable
        return pattern == "all" or re.search(pattern, name) is not None

    def _trainable_marks(self) -> list[Hashable]:
        """What trains in each layer."""
        marks: dict[str, set[str]] = {}
        for name in self.params:
            layers = self.names.of(name)
            for layer in layers if layers != [name] else []:
                _, number, own = layer.split("/", 2)
                chosen = marks.setdefault(number, set())
                if self._selects(layer):
                    chosen.add(own)
        return [frozenset(marks[number]) for number in sorted(marks, key=int)]


def _check_variable(name: str, variable: Any) -> None:
    """Refuses what cannot be sharded or trained; the author of a method reads it."""
    fix = "; make it nnx.Param(value, axes=(...)), a logical name or None for each dimension"
    if not isinstance(variable, nnx.Variable):
        raise ConfigError(f"{name}: an array of a module is no variable of it{fix}")
    axes = variable.get_metadata().get("axes")
    if axes is None:
        raise ConfigError(f"{name}: a variable without logical axes{fix}")
    ndim = variable.ndim - LayerNames.are_stacked([name])
    if len(axes) != ndim:
        raise ConfigError(f"{name}: axes={axes} for {ndim} dimensions{fix}")
    if issubclass(variable.type, nnx.Param) and not jnp.issubdtype(variable.dtype, jnp.floating):
        raise ConfigError(
            f"{name}: an nnx.Param of dtype {variable.dtype} has no gradient; "
            "make it another nnx.Variable, which is saved and not trained"
        )


def init_state(
    model_def: ModelDef, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the state before the first step, freshly initialised."""
    return new_state(model_def, optimizer, *model_def.init(key))


def new_state(
    model_def: ModelDef,
    optimizer: optax.GradientTransformation,
    params: Params,
    variables: Params,
) -> TrainState:
    """Returns the state before the first step with these parameters and variables."""
    trainable = {name: params[name] for name in model_def.trainable()}
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(trainable))


def abstract_state(
    model_def: ModelDef, optimizer: optax.GradientTransformation, device_mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, for compiling and restoring."""
    state = jax.eval_shape(lambda: init_state(model_def, optimizer, jax.random.key(0)))
    return place(state, device_mesh)


def place(tree: Tree, device_mesh: jax.sharding.Mesh) -> Tree:
    """Returns an abstract tree on a mesh: what has no partition is on every device."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
        return _placed(leaf, spec, device_mesh)

    return jax.tree.map(placed, tree)


def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding.with_memory_kind("device"))


def _placed(
    array: Any, spec: PartitionSpec, device_mesh: jax.sharding.Mesh
) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(device_mesh, spec)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
