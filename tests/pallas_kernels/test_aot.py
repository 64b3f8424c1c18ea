"""Attention for TPU and GPU targets, compiled by their compilers without the hardware."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

LENGTH, HEADS, HEAD_DIM = 32768, 4, 64
# One score matrix of one head in bytes; an array of the size of the queries is 128
# times smaller.
SCORES = 4 * LENGTH**2
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  name: "NVIDIA H200"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
TARGETS = {
    "tpu": ("libtpu", {"topology_name": "v5e:2x2"}),
    "cuda": (
        "jax_plugins.xla_cuda13",
        {"topology": "1x1x1", "target_config": H200},
    ),
}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def temporary_bytes(platform: str) -> int:
    """Returns the temporary memory of forward and backward; run in its own process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from pallas_kernels import BlockMask, Strided, block_sparse_attention

    topology = topologies.get_topology_desc(platform=platform, **TARGETS[platform][1])
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    rule = Strided(64, 16, HEADS, left=4)
    block_mask = BlockMask.from_rule(rule, LENGTH, is_causal=True)

    def gradients(block_mask, d_out, *arrays):
        attend = functools.partial(block_sparse_attention, block_mask=block_mask, is_causal=True)
        return jax.vjp(attend, *arrays)[1](d_out)

    array = jax.ShapeDtypeStruct((1, LENGTH, HEADS, HEAD_DIM), jnp.bfloat16, sharding=device)
    tables = jax.tree.map(
        lambda table: jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=device),
        block_mask,
    )
    traced = jax.jit(gradients).trace(tables, array, array, array, array)
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("platform", TARGETS)
def test_no_score_matrix(platform):
    module = TARGETS[platform][0]
    if not installed(module):
        pytest.skip(f"{module} is not installed: pip install '.[aot]'")
    # A process of its own: the plugins must be found before JAX starts, and theirs is
    # not the process to share with eight simulated CPU devices.
    result = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.test_aot", platform],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    temporary = json.loads(result.stdout.splitlines()[-1])
    assert 0 < temporary < SCORES // 8


if __name__ == "__main__":
    print(json.dumps(temporary_bytes(sys.argv[1])))
