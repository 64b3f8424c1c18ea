"""The train state, and the bridge between an NNX model and its flat variables."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

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

# Variables of a model, array or abstract, by their paths, e.g.
# "stacks/0/unit/0/attention/query/kernel".
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
        model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
        self._graphdef, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        self._paths = {"/".join(map(str, path)): path for path in flat}
        named = {name: flat[path] for name, path in self._paths.items()}
        self.params: dict[str, nnx.Variable] = {
            name: v for name, v in named.items() if issubclass(v.type, nnx.Param)
        }
        self.variables: dict[str, nnx.Variable] = {
            name: v for name, v in named.items() if name not in self.params
        }

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
            state = nnx.as_pure(nnx.state(make_model(self.config, rngs=nnx.Rngs(params=key))))
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
        """Returns the names `train.trainable` selects: "all", or by a regular expression.

        Raises:
          ValueError: it selects nothing.
        """
        pattern = self.config.train.trainable
        names = [n for n in self.params if pattern == "all" or re.search(pattern, n)]
        if not names:
            shown = ", ".join(sorted(self.params)[:8])
            raise ConfigError(f"train.trainable={pattern!r} matches no parameter; some are {shown}")
        return names


def init_state(
    model_def: ModelDef, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the state before the first step."""
    params, variables = model_def.init(key)
    trainable = {name: params[name] for name in model_def.trainable()}
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(trainable))


def abstract_state(
    model_def: ModelDef, optimizer: optax.GradientTransformation, device_mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state, for compiling and restoring."""
    state = jax.eval_shape(lambda: init_state(model_def, optimizer, jax.random.key(0)))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
        return _placed(leaf, spec, device_mesh)

    return jax.tree.map(placed, state)


def _placed(
    array: Any, spec: PartitionSpec, device_mesh: jax.sharding.Mesh
) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(device_mesh, spec)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
