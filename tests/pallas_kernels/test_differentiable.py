"""Lists, padding, gradients and vmap around kernels, with plain loops as the kernel."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, kernel_tables
from pallas_kernels.block_sparse_attention import differentiable
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target
from tests.pallas_kernels import kernel_cases, list_loops


def _output_shapes(query, *rest):
    batch, length, heads, _ = query.shape
    lse = jax.ShapeDtypeStruct((batch, heads, length), np.float32)
    return jax.ShapeDtypeStruct(query.shape, query.dtype), lse


def _gradient_shapes(*arrays):
    return tuple(jax.ShapeDtypeStruct(x.shape, np.float32) for x in arrays[:3])


LOOPS = types.SimpleNamespace(
    forward=list_loops.on_host(list_loops.forward, _output_shapes),
    backward=list_loops.on_host(list_loops.backward, _gradient_shapes),
)
TILES = [(64, 64), (128, 32), (32, 64)]


def attend(call):
    tilings = [Tiling.of(call.block_mask, *tiles) for tiles in TILES]
    plan = Plan(call.block_mask.geometry, *tilings, call.scores, Target("cpu"))
    return differentiable.attend(LOOPS, plan, call, head_multiple=16)


@pytest.mark.parametrize("name", kernel_cases.CASES)
@pytest.mark.representative(
    "dense_longer_keys",
    "random_ragged",
    "pattern_per_batch",
    "prefix",
    "segments",
    "strided",
    "head_dim_80",
    "nothing",
)
def test_loops_over_lists(name):
    case = kernel_cases.CASES[name]
    call = kernel_cases.make(case)
    for tiles in TILES:
        assert kernel_tables.refusal(call.block_mask, *tiles) is None
    actual = kernel_cases.results(attend, call)
    kernel_cases.assert_agree(actual, kernel_cases.expected(call), case.dtype)


@pytest.mark.exhaustive
def test_vmap_folds_into_the_batch():
    """Arrays and masks are mapped, or one of them alone."""
    case = kernel_cases.CASES["pattern_per_query_head"]
    call = kernel_cases.make(case)
    arrays = [jnp.stack([x, x + 1, 2 * x]) for x in (call.query, call.key, call.value)]
    maps = np.random.default_rng(3).random((3, 4, 4, 4)) < 0.5

    def run(query, key, value, block_map):
        block_mask = BlockMask.from_block_map(block_map, 256, 256, 64, 64, is_causal=True)
        one = dataclasses.replace(call, block_mask=block_mask)
        return kernel_cases.results(attend, one, (query, key, value))

    one_by_one = [run(*(x[i] for x in arrays), jnp.asarray(maps[i])) for i in range(3)]
    together = jax.vmap(run)(*arrays, jnp.asarray(maps))
    one_mask = jax.vmap(run, in_axes=(0, 0, 0, None))(*arrays, jnp.asarray(maps[0]))
    for i, expected in enumerate(one_by_one):
        for actual, wanted in zip(together, expected, strict=True):
            np.testing.assert_allclose(actual[i], wanted, atol=1e-5)
    for actual, wanted in zip(one_mask, one_by_one[0], strict=True):
        np.testing.assert_allclose(actual[0], wanted, atol=1e-5)
