"""The Hopper kernels at production sizes, compiled by XLA, Mosaic and ptxas."""

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Dense, Strided, aot, block_sparse_attention
from tests.pallas_kernels import aot_process

pytestmark = pytest.mark.aot

LENGTH, HEADS, KV_HEADS = 32768, 32, 8


@dataclasses.dataclass(frozen=True)
class Program:
    """Forward and backward of one call.

    Attributes:
        most_spilled: bytes per thread. They are around the inner loops and in masked tiles,
            where dK and dV and their scores leave no room; of float32 they are pieces.
    """

    block_mask: Callable[[], BlockMask]
    head_dim: int = 128
    dtype: Any = jnp.bfloat16
    has_segments: bool = False
    soft_cap: float | None = None
    most_spilled: int = 256


def _rule(rule):
    return lambda: BlockMask.from_rule(rule, LENGTH, is_causal=True)


def _random(heads, block):
    def build():
        blocks = LENGTH // block
        block_map = np.random.default_rng(0).random((heads, blocks, blocks)) < 0.1
        return BlockMask.from_block_map(block_map, LENGTH, LENGTH, block, block, is_causal=True)

    return build


PROGRAMS = {
    "dense": Program(_rule(Dense())),
    "stripes": Program(_rule(Strided(64, 8, HEADS, num_kv_heads=KV_HEADS, left=16)), head_dim=80),
    "random_64": Program(_random(KV_HEADS, 64), has_segments=True, soft_cap=30.0),
    "random_128": Program(_random(1, 128), head_dim=64, dtype=jnp.float16),
    "dense_192": Program(_rule(Dense()), head_dim=192),
    "dense_256": Program(_rule(Dense()), head_dim=256, soft_cap=50.0),
    "float32": Program(_random(1, 64), dtype=jnp.float32, most_spilled=480),
    "float32_192": Program(_random(1, 64), head_dim=192, dtype=jnp.float32, most_spilled=640),
    "float32_256": Program(
        _rule(Dense()), head_dim=256, dtype=jnp.float32, has_segments=True, most_spilled=1024
    ),
}


@functools.cache
def outcomes() -> dict[str, dict[str, int]]:
    """Compiles every program, in one process."""
    return aot_process.run("tests.pallas_kernels.test_aot_hopper")


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_without_a_score_matrix(name):
    outcome = outcomes()[name]
    # Queries, output and their gradients, padded to whole tiles and heads, with the lists.
    assert 0 < outcome["temporary"] < 6 * outcome["queries"]
    assert outcome["kernels"] == 3
    assert outcome["spilled"] <= PROGRAMS[name].most_spilled
    assert not outcome["serialized"]


def compile_program(program: Program) -> dict[str, int]:
    """Returns bytes of temporary memory, of the queries and of spilled registers.

    With them the number of kernels, and whether a product waits for the one before it:
    the compiler says so where the registers do not allow it otherwise.
    """

    def gradients(block_mask, segment_ids, d_out, *arrays):
        attend = functools.partial(
            block_sparse_attention,
            block_mask=block_mask,
            is_causal=True,
            segment_ids=segment_ids,
            logits_soft_cap=program.soft_cap,
            implementation="mosaic_gpu",
        )
        return jax.vjp(attend, *arrays)[1](d_out)

    query, key = (
        jax.ShapeDtypeStruct((1, LENGTH, heads, program.head_dim), program.dtype)
        for heads in (HEADS, KV_HEADS)
    )
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    segment_ids = (ids, ids) if program.has_segments else None
    # The mask is an argument: its lists are cut anew inside the program.
    arguments = (program.block_mask(), segment_ids, query, query, key, key)
    with printed() as lines:
        compiled = aot.compile_for("h200", gradients, *arguments)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", lines())]
    head = -(-program.head_dim // 64) * 64
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "queries": LENGTH * HEADS * head * query.dtype.itemsize,
        "kernels": len(re.findall("custom-call.*mosaic_gpu", compiled.as_text())),
        "spilled": max(spilled),
        "serialized": "wgmma.mma_async instructions are serialized" in lines(),
    }


@contextmanager
def printed() -> Iterator[Callable[[], str]]:
    """Catches what compilers write to the streams of the process; returns a reader."""
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield lambda: text
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            text = file.read().decode()


if __name__ == "__main__":
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # It prints the compiler's report.
    print(json.dumps({name: compile_program(one) for name, one in PROGRAMS.items()}))
