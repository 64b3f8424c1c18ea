"""The sparse weights of a layer, inside the scan over layers."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from sparseformer_jax.sparsity.base import State, Target, WeightSparsity


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """Which weights of a layer are sparse, and how: layers of equal ones may scan together.

    Attributes:
      method: of sparsity.
      targets: paths of modules in the layer, "mlp/up", each with its target.
    """

    method: WeightSparsity
    targets: tuple[tuple[str, Target], ...]

    def attach(self, layer: nnx.Module) -> None:
        """Adds variables for the state beside each weight, zeros until there are weights."""
        for path, target in self.targets:
            module: Any = _module(layer, path)
            weight = module.kernel
            state = jax.eval_shape(
                lambda value, own=target: self.method.init(value, own, jax.random.key(0), None),
                weight[...],
            )
            for name, kind in self.method.variables.items():
                array = state[name]
                axes = (*(None,) * (array.ndim - weight.ndim), *weight.axes)
                value = jnp.zeros(array.shape, array.dtype)
                group: dict[str, Any] = self.method.optimizer_group(name)
                setattr(module, name, kind(value, axes=axes, **group))

    def apply(
        self, layer: nnx.Module, step: Any, key: Key[Array, ""]
    ) -> tuple[nnx.Module, dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns the layer with the weights that products see, losses and diagnostics.

        Args:
          layer: with dense weights and their state.
          step: of training.
          key: of the step and the layer.
        """
        graphdef, state = nnx.split(layer)
        flat = {"/".join(map(str, path)): (path, value) for path, value in nnx.to_flat_state(state)}
        losses: dict[str, jax.Array] = {}
        diagnostics: dict[str, jax.Array] = {}
        # The backward pass makes masks anew: it needs weight, state and key.
        apply = jax.checkpoint(self.method.apply, static_argnums=2, prevent_cse=False)
        for path, target in self.targets:
            own: State = {name: flat[f"{path}/{name}"][1][...] for name in self.method.variables}
            place, weight = flat[f"{path}/kernel"]
            applied = apply(weight[...], own, target, step, weight_key(key, path))
            flat[f"{path}/kernel"] = place, weight.replace(applied.weight)
            for name, value in applied.losses.items():
                losses[name] = losses.get(name, 0.0) + value
            for name, value in applied.diagnostics.items():
                diagnostics[name] = diagnostics.get(name, 0.0) + value / len(self.targets)
        sparse = nnx.merge(graphdef, nnx.from_flat_state(list(flat.values())))
        return sparse, losses, diagnostics


def weight_key(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """Returns the key of a weight by its path in a layer, which does not depend on the others."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _module(layer: Any, path: str) -> Any:
    for part in path.split("/"):
        layer = getattr(layer, part)
    return layer
