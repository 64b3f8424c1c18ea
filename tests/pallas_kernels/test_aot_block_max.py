"""Block maxima, compiled for TPU and GPU by their compilers."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_max_attention
from tests.pallas_kernels import aot_process

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


if __name__ == "__main__":
    print(json.dumps(temporary_bytes(sys.argv[1])))
