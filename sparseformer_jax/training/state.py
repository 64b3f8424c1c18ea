"""The train state, and the bridge between an NNX model and its flat variables."""

import dataclasses
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sparseformer_jax import mesh, registry
from sparseformer_jax.build import make_model
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.model.transformer import Transformer
from sparseformer_jax.sparsity.base import Target, WeightSparsity, hard
from sparseformer_jax.sparsity.layers import LayerWeights
from sparseformer_jax.sparsity.targets import KERNEL, choose
from sparseformer_jax.training import weight_sparsity
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
      sparsity: the method of weight sparsity.
      targets: weights that it makes sparse, by their names.
    """

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        options = registry.options("sparsity", config.sparsity)
        self.sparsity: WeightSparsity = registry.method("sparsity", config.sparsity.name).Method(
            options
        )
        self.targets: dict[str, Target] = {}
        self._marks: list[Hashable] | None = None
        self._sparse_weights: list[LayerWeights | None] | None = None
        self._trace()
        if options.targets:
            self._choose_targets(options.targets)
        marks = self._trainable_marks()
        if len(set(marks)) > 1:
            # What only some layers train, they get stacks of their own for.
            self._marks = marks
            self._trace()

    def _trace(self) -> None:
        """Takes structure and names from the model, without making an array."""
        model = nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
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
        self.targets = self._stacked_targets()

    def _make(self, rngs: nnx.Rngs) -> Transformer:
        return make_model(
            self.config, marks=self._marks, sparse_weights=self._sparse_weights, rngs=rngs
        )

    def _choose_targets(self, targets: Sequence[str]) -> None:
        """Traces the model once more, with state beside the weights that are to be sparse."""
        variables = {layer: v for name, v in self.params.items() for layer in self.names.of(name)}
        of_layers: dict[str, list[tuple[str, Target]]] = {}
        for name, target in choose(targets, variables, self.sparsity).items():
            _, number, path = name.split("/", 2)
            of_layers.setdefault(number, []).append((path.removesuffix(f"/{KERNEL}"), target))
        self._sparse_weights = [
            LayerWeights(self.sparsity, tuple(own)) if (own := of_layers.get(str(number))) else None
            for number in range(self.config.model.num_layers)
        ]
        self._trace()

    def _stacked_targets(self) -> dict[str, Target]:
        """The targets of all layers, by the names of their stacked weights."""
        by_layer = {
            f"layers/{number}/{path}/{KERNEL}": target
            for number, weights in enumerate(self._sparse_weights or ())
            for path, target in (weights.targets if weights else ())
        }
        first = {name: self.names.of(name)[0] for name in self.params}
        return {name: by_layer[layer] for name, layer in first.items() if layer in by_layer}

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
        self,
        params: Mapping[str, Any],
        variables: Mapping[str, Any],
        step: Any,
        sparsity_key: jax.Array | None = None,
    ) -> Transformer:
        """Returns the model as it is at a step: the one way from a state to a model.

        Args:
          params: of a state.
          variables: of a state.
          step: of training.
          sparsity_key: of the noise in sparse weights, in training; None, in evaluation: they
            are those of their hard masks.
        """
        values = {**params, **variables}
        if sparsity_key is None:
            values |= self.hard_weights(values)
        model = self._merge(values)
        model.step, model.sparsity_key = step, sparsity_key
        return model

    def abstract_model(self) -> Transformer:
        """Returns the model with shapes in place of arrays."""
        return self._merge({**self.params, **self.variables})

    def _merge(self, values: Mapping[str, Any]) -> Transformer:
        flat = [(path, values[name]) for name, path in self._paths.items()]
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

    def sparsity_state(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the state of a sparse weight, by its own names, out of the values of all."""
        return {own: values[path] for own, path in self.sparsity.state_names(name).items()}

    def masks(self, values: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the hard masks of sparse weights, by the weights' names; True keeps.

        Args:
          values: parameters and variables of a state, at least those of sparse weights.
        """
        return {
            name: self.sparsity.kept(values[name], self.sparsity_state(name, values), target)
            for name, target in self.targets.items()
        }

    def hardened(self, state: TrainState) -> tuple["ModelDef", TrainState]:
        """Returns a model of dense weights, zero where masks drop them, for many calls of it."""
        if not self.targets:
            return self, state
        config = self.config.copy_and_resolve_references()
        config.sparsity = registry.method_config("sparsity", "none")
        config.train.trainable = "all"
        dense = ModelDef(config)

        def layers(params: Params, variables: Params) -> Params:
            values = {**params, **variables}
            return self.to_layers({**values, **self.hard_weights(values)})

        named = jax.jit(layers)(state.params, state.variables)
        params, variables = (
            {n: named[n] for name in part for n in dense.names.of(name)}
            for part in (dense.params, dense.variables)
        )
        params, variables = dense.from_layers((params, variables))
        return dense, TrainState(state.step, params, variables)

    def hard_weights(self, values: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns sparse weights with zeros where their masks drop them; see `masks`."""
        return {name: hard(values[name], kept) for name, kept in self.masks(values).items()}

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Returns fresh parameters and other variables, sharded over the current mesh."""

        def init(key: jax.Array) -> Params:
            model = self._make(nnx.Rngs(key))
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

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one layer's part of a variable."""
        variable = self.params.get(name) or self.variables[name]
        return tuple(variable.shape[axis] for axis in self.layer_axes(name))

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
    model_def: ModelDef,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    priors: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """Returns the state before the first step, freshly initialised.

    Args:
      model_def: of the model.
      optimizer: of its trainable parameters.
      key: of all that is drawn.
      priors: masks to start from, by the names of weights.
    """
    started = weight_sparsity.start(model_def, *model_def.init(key), key, priors or {})
    return new_state(model_def, optimizer, *started)


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
