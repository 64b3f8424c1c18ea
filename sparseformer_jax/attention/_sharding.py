"""Runs a method on each device's tokens and heads, and adds up what devices found."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from sparseformer_jax import mesh
from sparseformer_jax.attention.inputs import Inputs, local_shard, partition
from sparseformer_jax.model.read_only import read_only

TOKEN_AXES = mesh.LOGICAL_AXES["batch"] + mesh.LOGICAL_AXES["seq"]
HEAD_AXES = mesh.LOGICAL_AXES["heads"]


def over_devices(
    module: Any,
    function: Callable[..., Any],
    inputs: Inputs,
    *others: Any,
    other_specs: tuple[Any, ...],
    out_specs: Callable[[PartitionSpec], Any],
) -> Any:
    """Returns function(module, inputs, shard, *others), called on each device's part of all.

    Args:
      module: an `Attention`; each device has the parameters of its heads, whole.
      function: called where each device runs alone.
      inputs: of all tokens and heads.
      others: what the function takes beside.
      other_specs: the partitions of those.
      out_specs: the partitions of what it returns, given that of queries [B, T, N, H].
    """
    inputs_spec = partition(inputs, gathers_keys=module.gathers_keys)
    inputs = jax.tree.map(jax.reshard, inputs, inputs_spec)
    graphdef, state = nnx.split(module)
    state, state_spec = _gather_parameters(state)

    def local(state: Any, inputs: Inputs, *others: Any) -> Any:
        num_heads, gathers_keys = module.config.num_heads, module.gathers_keys
        own = nnx.merge(graphdef, state)
        with read_only(own):
            shard = local_shard(inputs, num_heads, gathers_keys=gathers_keys)
            return function(own, inputs, shard, *others)

    return jax.shard_map(
        local,
        in_specs=(state_spec, inputs_spec, *other_specs),
        out_specs=out_specs(inputs_spec.query),
        check_vma=False,  # kernels inside are custom calls, which carry no such types
    )(state, inputs, *others)


def summed(statistic: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over devices with other tokens; the mean over other heads, if entries have none."""
    others = tuple(axis for axis in mesh.AXES if axis not in (*TOKEN_AXES, *spec))
    return jax.lax.pmean(jax.lax.psum(statistic, TOKEN_AXES), others)


def _gather_parameters(state: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters whole along `embed` and the partition of each."""

    def gathered(variable: nnx.Variable) -> PartitionSpec:
        return mesh.spec(*mesh.gathered_axes(variable.get_metadata("axes")))

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    specs = jax.tree.map(gathered, state, is_leaf=is_variable)
    pure = nnx.as_pure(state)
    return jax.tree.map(jax.reshard, pure, nnx.as_pure(specs)), specs
