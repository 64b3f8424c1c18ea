"""The Triton kernels at production sizes, compiled for Ampere and Hopper."""

import contextlib
import functools
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockMask,
    Dense,
    Strided,
    aot,
    block_max_attention,
    block_sparse_attention,
)
from pallas_kernels.block_max import api as block_max_api
from pallas_kernels.selection import Implementations
from tests.pallas_kernels import aot_process

pytestmark = pytest.mark.aot

LENGTH, HEADS, KV_HEADS, BLOCK = 32768, 32, 8, 64
# One bit per pair of tokens of one head: less than one copy of the queries, too.
PAIRS = LENGTH**2 // 8
SHARED_MEMORY = {"a100": ("sm_80", 166912), "h200": ("sm_90a", 232448)}
# By name: mask, head dimension, dtype, and whether capped and segmented.
CASES = {
    "dense": ("dense", 128, jnp.bfloat16, False),
    "s2": ("s2", 64, jnp.float16, False),
    "random": ("random", 128, jnp.bfloat16, True),
    "head_dim_80": ("s2", 80, jnp.bfloat16, True),
    "head_dim_192": ("dense", 192, jnp.bfloat16, False),
    "float32": ("random", 128, jnp.float32, False),
    "float32_64": ("s2", 64, jnp.float32, True),
}


def block_mask(kind: str) -> BlockMask:
    if kind == "dense":
        return BlockMask.from_rule(Dense(), LENGTH, is_causal=True)
    if kind == "s2":
        rule = Strided(BLOCK, 8, HEADS, KV_HEADS, left=16, phase_by="kv_head")
        return BlockMask.from_rule(rule, LENGTH, is_causal=True)
    blocks = LENGTH // BLOCK
    chosen = np.random.default_rng(0).random((KV_HEADS, blocks, blocks)) < 0.1
    return BlockMask.from_block_map(chosen, LENGTH, LENGTH, BLOCK, BLOCK, is_causal=True)


def attention_memory(machine: str, kind: str, head_dim: int, dtype, is_hard: bool) -> int:
    """Returns the temporary memory of forward and backward."""

    def gradients(block_mask, d_out, ids, *arrays):
        attend = functools.partial(
            block_sparse_attention,
            block_mask=block_mask,
            is_causal=True,
            logits_soft_cap=30.0 if is_hard else None,
            segment_ids=(ids, ids) if is_hard else None,
            implementation="triton",
        )
        return jax.vjp(attend, *arrays)[1](d_out)

    query, key = (
        jax.ShapeDtypeStruct((1, LENGTH, heads, head_dim), dtype) for heads in (HEADS, KV_HEADS)
    )
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    mask = block_mask(kind)
    compiled = aot.compile_for(machine, gradients, mask, query, ids, query, key, key)
    return compiled.memory_analysis().temp_size_in_bytes


def block_max_memory(machine: str, query_block: int | None) -> int:
    """Returns the temporary memory, beyond results waiting for their final layout."""
    only = Implementations("pallas_kernels.block_max", ("triton",))
    query, key, lse = (
        jax.ShapeDtypeStruct((1, LENGTH, *rest), dtype)
        for rest, dtype in (
            ((KV_HEADS, 128), jnp.bfloat16),
            ((2, 128), jnp.bfloat16),
            ((KV_HEADS,), jnp.float32),
        )
    )

    def maxima(*arrays):
        return block_max_attention(
            *arrays,
            query_block_size=query_block,
            key_block_size=BLOCK,
            is_causal=True,
            group_reduction="max",
            implementation="triton",
        )

    with mock.patch.object(block_max_api, "IMPLEMENTATIONS", only):
        memory = aot.compile_for(machine, maxima, query, key, lse).memory_analysis()
    return memory.temp_size_in_bytes - 2 * memory.output_size_in_bytes


@contextlib.contextmanager
def recorded():
    """Gives the results of Triton's compilations: nothing else tells their limits."""
    from jax_triton import triton_lib

    results, compile_kernel = [], triton_lib.compile_ttir_inplace

    def record(*arguments):
        results.append(compile_kernel(*arguments))
        return results[-1]

    triton_lib.compile_ttir_inplace = record
    yield results
    triton_lib.compile_ttir_inplace = compile_kernel


def spilled_bytes(ptx: str, architecture: str) -> int:
    """Returns what does not fit into registers, by the assembler."""
    [folder] = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    with tempfile.TemporaryDirectory() as scratch:
        source, output = pathlib.Path(scratch, "kernel.ptx"), pathlib.Path(scratch, "kernel")
        source.write_text(ptx, encoding="utf-8")
        result = subprocess.run(
            [f"{folder}/bin/ptxas", "-v", "-arch", architecture, source, "-o", output],
            capture_output=True,
            text=True,
            check=True,
        )
    return int(re.search(r"(\d+) bytes spill stores", result.stderr)[1])


def main(machine: str) -> dict[str, dict]:
    architecture, _ = SHARED_MEMORY[machine]
    compilations = {
        name: functools.partial(attention_memory, machine, *case) for name, case in CASES.items()
    }
    compilations["block_max"] = functools.partial(block_max_memory, machine, BLOCK)
    compilations["block_max_rows"] = functools.partial(block_max_memory, machine, None)
    found = {}
    for name, compilation in compilations.items():
        with recorded() as kernels:
            temporary = compilation()
        found[name] = {
            "temporary": temporary,
            "shared": {kernel.name: kernel.shared_mem_bytes for kernel in kernels},
            "spilled": {k.name: spilled_bytes(k.binary, architecture) for k in kernels},
        }
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, dict]]:
    """Of each machine; two processes side by side, as neither uses more than a core."""
    compile_all = functools.partial(aot_process.run, "tests.pallas_kernels.test_aot_triton")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARED_MEMORY, pool.map(compile_all, SHARED_MEMORY), strict=True))


def most_spilled() -> int:
    """Bytes: a few numbers per thread, under soft caps; more would tell a bad shape.

    Triton 3.6 keeps fewer in registers: 232 bytes in one kernel of Hopper, dK and dV.
    """
    is_old = metadata.version("triton").startswith("3.6.")
    return 240 if is_old else 96


@pytest.mark.parametrize("machine", SHARED_MEMORY)
def test_fits_the_machine(machine, outcomes):
    found = outcomes[machine]
    assert found.keys() == CASES.keys() | {"block_max", "block_max_rows"}
    for name, case in found.items():
        assert case["temporary"] < PAIRS, (name, case)
        kernels = {"forward", "d_query", "d_key"} if name in CASES else {"block_max"}
        assert case["shared"].keys() == kernels
        assert max(case["shared"].values()) <= SHARED_MEMORY[machine][1], (name, case)
        assert max(case["spilled"].values()) <= most_spilled(), (name, case)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
