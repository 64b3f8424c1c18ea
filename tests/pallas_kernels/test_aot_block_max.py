"""Block maxima, compiled for TPU and GPU by their compilers."""

import dataclasses
import functools
import json
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_max_attention
from tests.pallas_kernels import aot_process
from tests.pallas_kernels.test_aot_hopper import printed

pytestmark = pytest.mark.aot

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 32768, 8, 2, 128
BLOCK, LARGE_BLOCK = 64, 512
# One bit per pair of tokens of one head: far below any array of scores.
PAIRS = LENGTH**2 // 8
IMPLEMENTATIONS = {
    "v5e": "pallas_tpu",
    "v5p": "pallas_tpu",
    "v6e": "pallas_tpu",
    "h200": "xla",
    "a100": "xla",
}


def temporary_bytes(machine: str) -> dict[str, int]:
    """Returns the temporary memory, beyond results waiting for their final layout."""
    query, key, lse, ids = (
        jax.ShapeDtypeStruct((1, LENGTH, *rest), dtype)
        for rest, dtype in (
            ((HEADS, HEAD_DIM), jnp.bfloat16),
            ((KV_HEADS, HEAD_DIM), jnp.bfloat16),
            ((HEADS,), jnp.float32),
            ((), jnp.int32),
        )
    )

    def prefill(*arrays, block=BLOCK):
        return block_max_attention(
            *arrays,
            query_block_size=block,
            key_block_size=block,
            is_causal=True,
            implementation=IMPLEMENTATIONS[machine],
        )

    def decode(query, key, lse, query_ids, key_ids):
        return block_max_attention(
            *(query, key, lse),
            query_block_size=None,
            key_block_size=BLOCK,
            is_causal=True,
            segment_ids=(query_ids, key_ids),
            logits_soft_cap=30.0,
            group_reduction="max",
            implementation=IMPLEMENTATIONS[machine],
        )

    compiled = {
        "prefill": aot.compile_for(machine, prefill, query, key, lse),
        "large": aot.compile_for(
            machine, functools.partial(prefill, block=LARGE_BLOCK), query, key, lse
        ),
        "decode": aot.compile_for(machine, decode, query, key, lse, ids, ids),
    }
    memory = {name: x.memory_analysis() for name, x in compiled.items()}
    return {name: x.temp_size_in_bytes - 2 * x.output_size_in_bytes for name, x in memory.items()}


@pytest.mark.parametrize("machine", IMPLEMENTATIONS)
def test_no_score_matrix(machine):
    temporary = aot_process.run("tests.pallas_kernels.test_aot_block_max", machine)
    assert temporary.keys() == {"prefill", "large", "decode"}
    assert max(temporary.values()) < PAIRS, temporary


@dataclasses.dataclass(frozen=True)
class HopperProgram:
    """A call at the sizes of a large model: 32 heads that read 8.

    Attributes:
        has_halves: whether two warpgroups share a block of keys, and write what each has of it.
    """

    query_block: int | None
    key_block: int = BLOCK
    head_dim: int = HEAD_DIM
    dtype: Any = jnp.bfloat16
    has_segments: bool = False
    has_halves: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


HOPPER_HEADS, HOPPER_KV_HEADS = 32, 8
# Of registers, per thread: the maxima of many small blocks, beside their masks.
MOST_SPILLED = 64
HOPPER_PROGRAMS = {
    "prefill": HopperProgram(BLOCK),
    "prefill, head of 64": HopperProgram(BLOCK, head_dim=64, dtype=jnp.float16),
    "prefill, head of 256": HopperProgram(BLOCK, head_dim=256),
    "prefill, small blocks": HopperProgram(16, 16, has_segments=True),
    "prefill, large blocks": HopperProgram(LARGE_BLOCK, LARGE_BLOCK),
    "prefill, float32": HopperProgram(BLOCK, dtype=jnp.float32),
    "prefill, float32, head of 256": HopperProgram(
        BLOCK, head_dim=256, dtype=jnp.float32, has_halves=True
    ),
    "decode": HopperProgram(None, has_segments=True, options={"logits_soft_cap": 30.0}),
    "decode, group": HopperProgram(None, options={"group_reduction": "max"}),
    "decode, head of 64": HopperProgram(
        None, 16, head_dim=64, options={"group_reduction": "max", "window_size": 4096}
    ),
    "decode, head of 256": HopperProgram(
        None, 32, head_dim=256, dtype=jnp.float16, options={"group_reduction": "max"}
    ),
}


@functools.cache
def hopper_outcomes() -> dict[str, dict[str, int]]:
    """Compiles every program, in one process."""
    return aot_process.run("tests.pallas_kernels.test_aot_block_max", "hopper")


@pytest.mark.parametrize("name", HOPPER_PROGRAMS)
def test_hopper_takes_one_kernel_and_no_score_matrix(name):
    outcome = hopper_outcomes()[name]
    # The sums of lse in base 2, the pieces of float32, and large blocks in parts.
    most = outcome["pieces"] + outcome["halves"] + 2 * outcome["lse"]
    assert outcome["temporary"] < most < PAIRS * HOPPER_HEADS
    assert outcome["kernels"] == 1
    assert outcome["spilled"] <= MOST_SPILLED


def compile_hopper(program: HopperProgram) -> dict[str, int]:
    """Returns bytes of temporary memory, of what may be copied, and of spilled registers."""
    query, key = (
        jax.ShapeDtypeStruct((1, LENGTH, heads, program.head_dim), program.dtype)
        for heads in (HOPPER_HEADS, HOPPER_KV_HEADS)
    )
    lse = jax.ShapeDtypeStruct((1, LENGTH, HOPPER_HEADS), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    def maxima(query, key, lse, segment_ids):
        return block_max_attention(
            *(query, key, lse),
            query_block_size=program.query_block,
            key_block_size=program.key_block,
            is_causal=True,
            segment_ids=segment_ids,
            **program.options,
        )

    segment_ids = (ids, ids) if program.has_segments else None
    with printed() as lines:
        compiled = aot.compile_for("h200", maxima, query, key, lse, segment_ids)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", lines())]
    memory = compiled.memory_analysis()
    # Three of bfloat16 for one of float32.
    pieces = 6 * (query.size + key.size) if program.dtype == jnp.float32 else 0
    return {
        "temporary": memory.temp_size_in_bytes,
        "lse": 4 * lse.size,
        "pieces": pieces,
        "halves": 2 * memory.output_size_in_bytes if program.has_halves else 0,
        "kernels": len(re.findall("custom-call.*mosaic_gpu", compiled.as_text())),
        "spilled": max(spilled),
    }


if __name__ == "__main__":
    if sys.argv[1] == "hopper":
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # It prints the compiler's report.
        found: dict[str, Any] = {
            name: compile_hopper(program) for name, program in HOPPER_PROGRAMS.items()
        }
    else:
        found = temporary_bytes(sys.argv[1])
    print(json.dumps(found))
