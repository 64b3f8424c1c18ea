"""A traced selection that its capacity cannot hold: every kernel computes what is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask
from pallas_kernels.block_sparse_attention import selection
from pallas_kernels.targets import Target
from tests.pallas_kernels import gpu_interpreter, kernel_cases
from tests.pallas_kernels.kernel_cases import Case

pytestmark = pytest.mark.usefixtures("quick_compilation")

CAPACITY = 2
# Rows that ask for too much, for just as much as there is room for, for less, for nothing.
ASKED = np.array(
    [
        [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]],
        [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]],
    ],
    bool,
)
KEPT = ASKED & (np.cumsum(ASKED, -1) <= CAPACITY)
TARGETS = {
    "reference": (Target("cpu"), jnp.float32),
    "xla": (Target("cpu"), jnp.float32),
    "pallas_tpu": (Target("tpu", interpret=True), jnp.float32),
    "mosaic_gpu": (gpu_interpreter.INTERPRETED, jnp.bfloat16),
}


def build(block_map, **options):
    return BlockMask.from_block_map(block_map, 250, 250, 64, 64, is_causal=False, **options)


def compare(name, target, dtype):
    """All results of an implementation, with those of `reference` for what is kept."""
    call = kernel_cases.make(Case(functools.partial(build, KEPT), dtype=dtype))
    attend = selection.load(name).attend

    @jax.jit
    def run(asked):
        block_mask = build(asked, capacity=CAPACITY)
        overfull = dataclasses.replace(call, block_mask=block_mask)
        results = kernel_cases.results(functools.partial(attend, target=target), overfull)
        return block_mask.overflow, results

    overflow, results = run(jnp.asarray(ASKED))
    assert overflow.all()
    kernel_cases.assert_agree(results, kernel_cases.expected(call), dtype)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_kept_is_computed(name, monkeypatch):
    gpu_interpreter.compile_once(monkeypatch)
    compare(name, *TARGETS[name])
