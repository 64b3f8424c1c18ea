"""What interpreters and compilers cannot show: the kernels on the machine at hand.

    JAX_PLATFORMS=cuda,cpu pytest -m device -n 8 -rs

A kernel that cannot run there is skipped with its own reason. Truths are computed on the
host, in float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, block_max_attention, block_sparse_attention, targets
from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.selection import IMPLEMENTATIONS
from pallas_kernels.selection import CannotRun
from tests.golden import test_s2
from tests.pallas_kernels import kernel_cases, test_block_max
from tests.pallas_kernels.kernel_cases import Case

pytestmark = pytest.mark.device

KERNELS = ("pallas_tpu", "mosaic_gpu", "triton", "xla")
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def selected(queries, keys, heads, **limits):
    """Random blocks of 64, of each head, and a row that sees nothing."""

    def build():
        block_map = kernel_cases.random_map(heads, -(-queries // 64), -(-keys // 64))
        return BlockMask.from_block_map(block_map, queries, keys, 64, 64, **limits)

    return build


# Every head in every type, with lists that go round the rings of tiles.
CASES = kernel_cases.CASES | {
    f"head_of_{head_dim}_{jnp.dtype(dtype)}": Case(
        selected(1500, 1700, 2, is_causal=True),
        batch=2,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        segments=2,
        dtype=dtype,
    )
    for head_dim in (64, 80, 96, 128, 192, 256)
    for dtype in DTYPES
}
# Tiles, stages and warps that `autotune` may choose.
TUNED = {
    f"{head_dim}_{jnp.dtype(dtype)}": Case(
        selected(700, 900, 1, is_causal=False), head_dim=head_dim, soft_cap=2.0, dtype=dtype
    )
    for head_dim in (64, 128, 256)
    for dtype in (jnp.bfloat16, jnp.float32)
}


def load(name, call):
    """Returns an implementation; skips the test where it cannot compute the call."""
    module = IMPLEMENTATIONS.load(name)
    reason = module.refusal(call, targets.current())
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return module


def expected(case, attend=reference.attend):
    with jax.default_device(jax.devices("cpu")[0]):
        return kernel_cases.expected(kernel_cases.make(case), attend)


def test_the_kernels_that_the_machine_is_for_can_run():
    """Or all that follows could be skipped for what is not installed."""
    target = targets.current()
    names = {"tpu": ["pallas_tpu"], "cuda": ["triton"]}.get(target.platform, ["xla"])
    if target.compute_capability == 90:
        names.append("mosaic_gpu")
    call = kernel_cases.make(CASES["bfloat16"])
    assert {name: IMPLEMENTATIONS.load(name).refusal(call, target) for name in names} == (
        dict.fromkeys(names)
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_attention_agrees_with_reference(name, case):
    call = kernel_cases.make(CASES[case])
    module = load(name, call)
    attend = functools.partial(module.attend, target=targets.current())
    actual = kernel_cases.results(attend, call)
    kernel_cases.assert_agree(actual, expected(CASES[case]), CASES[case].dtype)
    for one, other in zip(actual, kernel_cases.results(attend, call), strict=True):
        np.testing.assert_array_equal(one, other, err_msg="another run gives other bits")


@pytest.mark.parametrize("case", TUNED)
@pytest.mark.parametrize("name", ["pallas_tpu", "mosaic_gpu", "triton"])
def test_every_plan_of_autotune_agrees_with_reference(name, case):
    call = kernel_cases.make(TUNED[case])
    module = load(name, call)
    truth = expected(TUNED[case])
    for plan in module.plans(call, targets.current()):
        actual = kernel_cases.results(functools.partial(module.run, plan), call)
        kernel_cases.assert_agree(actual, truth, TUNED[case].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", [None, "cudnn"])
def test_dense_attention_without_lse_agrees_with_reference(implementation, dtype):
    """What is taken unasked gives the same bits again; cuDNN need not."""
    case = dataclasses.replace(CASES["dense_causal"], head_dim=128, dtype=dtype)
    call = kernel_cases.make(case)

    def best(call):
        arrays = (call.query, call.key, call.value)
        return block_sparse_attention(
            *arrays, call.block_mask, is_causal=True, implementation=implementation
        )

    def without_lse(out):
        return out, jnp.zeros(out.shape[:3], jnp.promote_types(out.dtype, jnp.float32))

    truth = expected(case, lambda call, target: without_lse(reference.attend(call, target)[0]))
    try:
        actual, again = (
            kernel_cases.results(lambda call: without_lse(best(call)), call) for _ in range(2)
        )
    except CannotRun as error:
        pytest.skip(str(error))
    kernel_cases.assert_agree(actual, truth, dtype)
    if implementation is None:
        for one, other in zip(actual, again, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", test_s2.SETTINGS["attention"], ids=lambda case: case["key"])
@pytest.mark.parametrize("name", KERNELS)
def test_official_attention_of_s2(name, case):
    call = kernel_cases.make(Case(lambda: test_s2.attention_mask(case), heads=4))
    load(name, call)
    test_s2.compare_attention(case, name)


@pytest.mark.parametrize("case", test_block_max.CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_block_max_agrees_with_loops(name, case):
    case = test_block_max.CASES[case]
    query, key, segment_ids = test_block_max.make(case)
    truth, lse = test_block_max.truth(case, query, key, segment_ids)
    run = functools.partial(
        block_max_attention,
        *(query, key, jnp.asarray(lse, jnp.float32)),
        segment_ids=segment_ids,
        implementation=name,
        **case.arguments(),
    )
    try:
        actual = jax.jit(run)()
    except CannotRun as error:
        pytest.skip(str(error))
    test_block_max.assert_agree(case, actual, truth)
