"""The train state, and the bridge between an NNX model and its flat parameters."""

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

# Every variable of a model, array or abstract, by its path, e.g.
# "stacks/0/unit/0/attention/query/kernel".
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, apart from the position in the data; arrays or abstract.

    Attributes:
      step: optimiser steps done.
      params: every variable of the model, frozen ones too.
      opt_state: of the trainable parameters only.
    """

    step: Any
    params: Params
    opt_state: Any


class ModelDef:
    """What is static about a config's model: structure, names and logical axes.

    Attributes:
      config: the config it was made from.
      variables: name -> abstract variable with its metadata.
    """

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
        self._graphdef, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        self._paths = {"/".join(map(str, path)): path for path in flat}
        self.variables: dict[str, nnx.Variable] = {
            name: flat[path] for name, path in self._paths.items()
        }

    def merge(self, params: Mapping[str, Any]) -> Transformer:
        """Returns the model with these parameters."""
        flat = [(path, params[name]) for name, path in self._paths.items()]
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

    def init(self, key: jax.Array) -> Params:
        """Returns freshly initialised parameters, sharded over the current mesh."""

        def init(key: jax.Array) -> Params:
            state = nnx.as_pure(nnx.state(make_model(self.config, rngs=nnx.Rngs(params=key))))
            flat = dict(nnx.to_flat_state(state))
            return {name: flat[path] for name, path in self._paths.items()}

        # Automatic axes let the partitioner draw each shard's numbers where they belong.
        specs = {name: self.spec(name) for name in self._paths}
        return jax.jit(jax.sharding.auto_axes(init, out_sharding=specs))(key)

    def spec(self, name: str) -> PartitionSpec:
        """Returns the partition of a parameter; stacked layers have a leading axis more."""
        variable = self.variables[name]
        axes = variable.get_metadata("axes")
        return mesh.spec(*(None,) * (variable.ndim - len(axes)), *axes)

    def abstract(self, device_mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes, dtypes and shardings of the parameters."""
        return {
            name: _placed(variable, self.spec(name), device_mesh)
            for name, variable in self.variables.items()
        }

    def trainable(self) -> list[str]:
        """Returns the names `train.trainable` selects: "all", or by a regular expression.

        Raises:
          ValueError: it selects nothing.
        """
        pattern = self.config.train.trainable
        params = [n for n, v in self.variables.items() if issubclass(v.type, nnx.Param)]
        names = params if pattern == "all" else [n for n in params if re.search(pattern, n)]
        if not names:
            shown = ", ".join(sorted(params)[:8])
            raise ConfigError(f"train.trainable={pattern!r} matches no parameter; some are {shown}")
        return names


def init_state(
    model_def: ModelDef, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the state before the first step."""
    params = model_def.init(key)
    trainable = {name: params[name] for name in model_def.trainable()}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))


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
