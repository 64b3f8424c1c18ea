"""The Pallas kernels for TPU at production sizes, compiled by Mosaic for each chip."""

import dataclasses
import functools
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BlockMask, Dense, Strided, aot, block_sparse_attention
from tests.pallas_kernels import aot_process

pytestmark = pytest.mark.aot

LENGTH = 32768
CHIPS = ("v5e", "v5p", "v6e")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Program:
    """Forward and backward of one call; the mask is a constant or an argument."""

    block_mask: Callable[[], BlockMask]
    head_dim: int = 128
    heads: int = 8
    kv_heads: int = 2
    has_segments: bool = False
    soft_cap: float | None = None
    is_traced: bool = False
    # Forward, dQ, and dK with dV.
    kernels: int = 3


def _rule(rule):
    return lambda: BlockMask.from_rule(rule, LENGTH, is_causal=True)


def _selected(heads: int) -> BlockMask:
    """Returns shapes only: a selection of blocks for each head."""
    blocks = LENGTH // 64
    return jax.eval_shape(
        lambda block_map: BlockMask.from_block_map(
            block_map, LENGTH, LENGTH, 64, 64, is_causal=True
        ),
        jax.ShapeDtypeStruct((heads, blocks, blocks), bool),
    )


PROGRAMS = {
    "dense": Program(_rule(Dense()), is_traced=True),
    "dense_256": Program(_rule(Dense()), head_dim=256),
    # One set of kernels for the band, one for the stripes.
    "stripes": Program(
        _rule(Strided(64, 16, 8, left=8)), head_dim=64, has_segments=True, kernels=6
    ),
    # More visits than scalar memory holds.
    "selected": Program(
        functools.partial(_selected, 16),
        heads=16,
        kv_heads=4,
        has_segments=True,
        soft_cap=30.0,
        is_traced=True,
    ),
}
CASES = list(itertools.product(PROGRAMS, DTYPES))


def compile_program(chip: str, name: str, dtype: str) -> dict[str, int]:
    """Returns the bytes of temporary memory and of one array of the queries' shape."""
    program = PROGRAMS[name]
    block_mask = program.block_mask()

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
        jax.ShapeDtypeStruct((1, LENGTH, heads, program.head_dim), dtype)
        for heads in (program.heads, program.kv_heads)
    )
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    arguments = [(ids, ids) if program.has_segments else None, query, query, key, key]
    if program.is_traced:
        compiled = aot.compile_for(chip, gradients, block_mask, *arguments)
    else:
        constant = functools.partial(gradients, block_mask)
        compiled = aot.compile_for(chip, constant, *arguments)
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "queries": query.size * query.dtype.itemsize,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    }


def outcome(chip: str, name: str, dtype: str) -> dict[str, Any]:
    try:
        return compile_program(chip, name, dtype)
    except Exception:
        return {"error": traceback.format_exc()}


@pytest.fixture(scope="module", params=CHIPS)
def outcomes(request) -> dict[str, dict[str, Any]]:
    """Of every case, compiled one after another: libtpu crashes when two are at once."""
    return aot_process.run("tests.pallas_kernels.test_aot_tpu", request.param)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_compiles_without_a_score_matrix(outcomes, name, dtype):
    found = outcomes[f"{name} {dtype}"]
    assert "error" not in found, found["error"]
    assert found["kernels"] == PROGRAMS[name].kernels
    assert 0 < found["temporary"] < 16 * found["queries"]


if __name__ == "__main__":
    print(json.dumps({" ".join(case): outcome(sys.argv[1], *case) for case in CASES}))
