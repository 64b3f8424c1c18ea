"""Whether a config can fit the devices, known from shapes before anything is allocated.

`describe` gives the exact figure, for which it compiles the training step.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh, units
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.state import ModelDef

# Copies of the parameters that an optimiser keeps.
_MOMENTS = {"adamw": 2, "muon": 1}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What training needs at least on each device, in bytes.

    Attributes:
      parameters: all of them.
      training: gradients and the optimiser's moments of those that train.
      activations: what the backward pass reads again.
    """

    parameters: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.training + self.activations


def estimate(config: ConfigDict) -> Estimate:
    """Returns a lower bound, by shape alone, under the config's mesh of all devices.

    With t tokens on a device, L layers and D, F, N, K, H divided as the mesh divides them,

        activations = t L D             with any `model.remat`
                      t L (3 D + 2 F + (2 N + 2 K) H)    without

    numbers of `model.compute_dtype`; t L D is t D where only a part of the model trains.
    """
    sizes = config_lib.resolve_mesh(config.mesh, jax.device_count())
    with jax.set_mesh(mesh.make_mesh(sizes)):
        model_def = ModelDef(config)
        params, variables = model_def.abstract(jax.sharding.get_mesh())
    trained = sum(_local_bytes(params[name]) for name in model_def.trainable())
    return Estimate(
        parameters=sum(map(_local_bytes, [*params.values(), *variables.values()])),
        training=(1 + _MOMENTS[config.optimizer.name]) * trained,
        activations=_activations(config, sizes),
    )


def check(config: ConfigDict) -> None:
    """Raises ConfigError if a config needs more memory than its devices have."""
    needed, present = estimate(config), capacity()
    if present is None or needed.total <= present:
        return
    parts = (
        f"parameters {units.size(needed.parameters)}, gradients and optimizer"
        f" {units.size(needed.training)}, activations {units.size(needed.activations)}"
    )
    raise ConfigError(
        f"config: needs at least {units.size(needed.total)} on each device ({parts}), which has"
        f" {units.size(present)}; make model, train.batch_size or data.seq_len smaller or mesh.fsdp"
        " larger, or try with --ignore_memory_estimate"
    )


def capacity() -> int | None:
    """Returns the bytes of memory of each device, None where that is unknown.

    Simulated devices of a CPU share the memory that the machine, or its control group, has.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and group.read_text().strip().isdigit():
        limits.append(int(group.read_text()))
    return min(limits) // jax.local_device_count()


def _activations(config: ConfigDict, sizes: dict[str, int]) -> int:
    model, pieces = config.model, config.train.accumulation_steps
    rows = config.train.batch_size // pieces // (sizes["data"] * sizes["fsdp"])
    tokens = rows * config.data.seq_len // sizes["context"]
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    width = model.embed_dim
    if config.train.trainable != "all":
        return tokens * width * jnp.dtype(model.compute_dtype).itemsize
    if model.remat == "none":
        width = 3 * width + (2 * model.mlp_dim + heads) // sizes["tensor"]
    return tokens * model.num_layers * width * jnp.dtype(model.compute_dtype).itemsize


def _local_bytes(array: Any) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
