"""The xla implementation, compiled for TPU and GPU by their compilers."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BlockMask, Strided, aot, block_sparse_attention
from tests.pallas_kernels import aot_process

pytestmark = pytest.mark.aot

LENGTH, HEADS, HEAD_DIM = 32768, 4, 64
# One score matrix of one head in bytes; an array of the size of the queries is 128
# times smaller.
SCORES = 4 * LENGTH**2


def temporary_bytes(machine: str) -> int:
    """Returns the temporary memory of forward and backward."""
    block_mask = BlockMask.from_rule(Strided(64, 16, HEADS, left=4), LENGTH, is_causal=True)

    def gradients(block_mask, d_out, *arrays):
        attend = functools.partial(
            block_sparse_attention, block_mask=block_mask, is_causal=True, implementation="xla"
        )
        return jax.vjp(attend, *arrays)[1](d_out)

    array = jax.ShapeDtypeStruct((1, LENGTH, HEADS, HEAD_DIM), jnp.bfloat16)
    compiled = aot.compile_for(machine, gradients, block_mask, array, array, array, array)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("machine", aot.MACHINES)
def test_no_score_matrix(machine):
    temporary = aot_process.run("tests.pallas_kernels.test_aot", machine)
    assert 0 < temporary < SCORES // 8


if __name__ == "__main__":
    print(json.dumps(temporary_bytes(sys.argv[1])))
