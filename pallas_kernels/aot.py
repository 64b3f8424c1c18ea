"""Compiles for TPU and GPU by their own compilers, without the hardware.

    compiled = aot.compile_for("h200", function, *arguments)
    print(compiled.memory_analysis())

Needs the extra [aot], JAX_PLATFORMS=cpu and, for a TPU, TPU_SKIP_MDS_QUERY=1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels import targets
from pallas_kernels.targets import Target


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA asks about an NVIDIA GPU."""

    name: str
    capability: tuple[int, int]
    cores: int
    shared_memory: int
    shared_memory_optin: int
    l2_cache: int
    bandwidth: int
    memory: int
    clock_ghz: float

    def description(self) -> str:
        """Returns a GpuTargetConfigProto in text format."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory_optin}
              threads_per_core_limit: 2048
              core_count: {self.cores}
              fpus_per_core: {64 if self.capability[0] == 8 else 128}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_cache}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              name: "{self.name}"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


_TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_GPUS = {
    "h200": _Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        shared_memory=233472,
        shared_memory_optin=232448,
        l2_cache=52428800,
        bandwidth=4800000000000,
        memory=151397597184,
        clock_ghz=1.98,
    ),
    "a100": _Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        shared_memory=167936,
        shared_memory_optin=166912,
        l2_cache=41943040,
        bandwidth=2039000000000,
        memory=85899345920,
        clock_ghz=1.41,
    ),
}
MACHINES = (*_TPUS, *_GPUS)


def compile_for(machine: str, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Returns the function compiled for one device of a machine.

    Args:
        machine: one of `MACHINES`: "v5e", "v5p", "v6e", "h200" or "a100".
        function: takes the arguments and returns arrays; traced anew, with the
            machine's `Target` as the current one.
        arguments: trees of arrays or `jax.ShapeDtypeStruct`; only shapes matter.

    Raises:
        ValueError: the machine is unknown.
    """
    topology, target = _topology(machine)
    mesh = topologies.make_mesh(topology, (len(topology.devices),), ("device",))
    replicated = jax.NamedSharding(mesh, jax.P())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=replicated), arguments
    )

    def on_one_device(*arguments: Any) -> Any:
        # Mosaic kernels are opaque to the partitioner: only inside shard_map may they
        # stand in a program for several devices. Every device computes the same.
        everywhere = jax.shard_map(
            function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
        )
        return everywhere(*arguments)

    with targets.use(target):
        traced = jax.jit(on_one_device).trace(*shapes)
        return traced.lower(lowering_platforms=(target.platform,)).compile()


def _topology(machine: str) -> tuple[Any, Target]:
    if machine in _TPUS:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[machine])
        device: jax.Device = topology.devices[0]
        return topology, Target("tpu", device.device_kind)
    if machine not in _GPUS:
        raise ValueError(f"machine={machine!r} must be one of {MACHINES}")
    gpu = _GPUS[machine]
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=gpu.description()
    )
    major, minor = gpu.capability
    return topology, Target("cuda", gpu.name, 10 * major + minor)
