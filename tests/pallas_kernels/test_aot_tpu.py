"""The Pallas kernels for TPU at production sizes, compiled by Mosaic for each chip."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BlockMask, Dense, Strided, aot, block_sparse_attention
from tests.pallas_kernels import aot_process

pytestmark = pytest.mark.aot


@dataclasses.dataclass(frozen=True)
class Program:
    """Forward and backward at one size; the mask is a constant or an argument."""

    machine: str
    block_mask: Callable[[int], BlockMask]
    length: int = 32768
    head_dim: int = 128
    heads: int = 8
    kv_heads: int = 2
    dtype: Any = jnp.bfloat16
    has_segments: bool = False
    soft_cap: float | None = None
    is_traced: bool = False


def _rule(rule):
    return lambda length: BlockMask.from_rule(rule, length, is_causal=True)


def _selected(heads: int, length: int) -> BlockMask:
    """Returns shapes only: a selection of blocks for each head."""
    blocks = length // 64
    return jax.eval_shape(
        lambda block_map: BlockMask.from_block_map(
            block_map, length, length, 64, 64, is_causal=True
        ),
        jax.ShapeDtypeStruct((heads, blocks, blocks), bool),
    )


PROGRAMS = {
    "dense": Program("v5e", _rule(Dense())),
    "selected": Program(
        "v5e",
        functools.partial(_selected, 8),
        16384,
        has_segments=True,
        soft_cap=30.0,
        is_traced=True,
    ),
    "stripes": Program("v5p", _rule(Strided(64, 16, 8, left=8)), head_dim=64),
    "dense_256": Program("v5p", _rule(Dense()), head_dim=256),
    # More visits than scalar memory holds.
    "selected_chunks": Program(
        "v6e", functools.partial(_selected, 16), heads=16, kv_heads=4, is_traced=True
    ),
    "float32": Program("v6e", _rule(Dense()), 8192, dtype=jnp.float32),
}


def compile_program(name: str) -> dict[str, int]:
    """Returns the bytes of temporary memory and of one array of the queries' shape."""
    program = PROGRAMS[name]
    block_mask = program.block_mask(program.length)

    def gradients(block_mask, segment_ids, d_out, *arrays):
        attend = functools.partial(
            block_sparse_attention,
            block_mask=block_mask,
            is_causal=True,
            segment_ids=segment_ids,
            logits_soft_cap=program.soft_cap,
            implementation="pallas_tpu",
        )
        return jax.vjp(attend, *arrays)[1](d_out)

    query, key = (
        jax.ShapeDtypeStruct((1, program.length, heads, program.head_dim), program.dtype)
        for heads in (program.heads, program.kv_heads)
    )
    ids = jax.ShapeDtypeStruct((1, program.length), jnp.int32)
    arguments = [(ids, ids) if program.has_segments else None, query, query, key, key]
    if program.is_traced:
        compiled = aot.compile_for(program.machine, gradients, block_mask, *arguments)
    else:
        constant = functools.partial(gradients, block_mask)
        compiled = aot.compile_for(program.machine, constant, *arguments)
    calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "queries": query.size * query.dtype.itemsize,
        "kernels": calls,
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_without_a_score_matrix(name):
    sizes = aot_process.run("tests.pallas_kernels.test_aot_tpu", name)
    # Forward, dQ, and dK with dV, of the band and of the stripes where these are apart.
    assert sizes["kernels"] == (6 if name == "stripes" else 3)
    assert sizes["temporary"] < 16 * sizes["queries"]


if __name__ == "__main__":
    print(json.dumps(compile_program(sys.argv[1])))
