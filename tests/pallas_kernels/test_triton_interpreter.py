"""What the Triton kernels compute, in Triton's interpreter on a CPU."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import targets
from pallas_kernels.block_max import api as block_max_api
from pallas_kernels.block_sparse_attention import triton
from pallas_kernels.block_sparse_attention.triton import tuning
from pallas_kernels.block_sparse_attention.triton.tuning import Shape
from pallas_kernels.selection import Implementations
from pallas_kernels.targets import Target
from tests.golden import test_s2
from tests.pallas_kernels import (
    kernel_cases,
    test_block_max,
    test_overflow,
    triton_interpreter,
)

pytestmark = pytest.mark.oracle

TARGET = Target("cuda", "NVIDIA A100", 80)
UNEQUAL_TILES = tuning.Tuning(Shape(64, 32, 4, 1), Shape(32, 128, 4, 1), Shape(128, 64, 4, 1))
UNEQUAL = ("random_ragged", "segments", "strided_groups", "prefix", "bfloat16")
# What the kernel does in its own way; the rest is shared.
BLOCK_MAX = (
    "ragged",
    "rows",
    "blocks_of_odd_sizes",
    "large_blocks",
    "many_small_blocks",
    "window_of_rows",
    "prefix_in_window",
    "segments_bidirectional",
    "soft_cap",
    "empty_rows",
    "nothing_visible",
    "over_group_rows",
    "bfloat16",
)
GOLDEN = {case["key"]: case for case in test_s2.SETTINGS["attention"]}
CHECKS = {
    "attention": kernel_cases.CASES,
    "unequal_tiles": UNEQUAL,
    "vmap": ("chunk",),
    "overflow": ("bfloat16", "float32"),
    "block_max": BLOCK_MAX,
    "golden": GOLDEN,
}
NAMES = [f"{kind} {name}" for kind, names in CHECKS.items() for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_reference(name):
    found = triton_interpreter.outcomes("tests.pallas_kernels.test_triton_interpreter")
    assert found[name] == ""


def check(name: str) -> None:
    kind, case = name.split()
    {
        "attention": check_attention,
        "unequal_tiles": check_unequal_tiles,
        "vmap": check_vmap,
        "overflow": check_overflow,
        "block_max": check_block_max,
        "golden": check_golden,
    }[kind](case)


def check_attention(name: str) -> None:
    case = kernel_cases.CASES[name]
    call = kernel_cases.make(case)
    assert triton.refusal(call, TARGET) == triton.triton_call.refusal()
    actual = kernel_cases.results(functools.partial(triton.attend, target=TARGET), call)
    kernel_cases.assert_agree(actual, kernel_cases.expected(call), case.dtype)


def check_unequal_tiles(name: str) -> None:
    with mock.patch.object(tuning, "choose", return_value=UNEQUAL_TILES):
        check_attention(name)


def check_vmap(name: str) -> None:
    """Every entry has its own offset and arrays; the lists are traced."""
    call = kernel_cases.make(kernel_cases.CASES[name])
    offsets = jnp.asarray([0, 100, 256], jnp.int32)
    factors = jnp.asarray([1, -1, 0.5], jnp.float32)

    def at(offset, factor):
        block_mask = call.block_mask.tightened(True, None, offset)
        return dataclasses.replace(call, block_mask=block_mask, query=factor * call.query)

    def run(*arguments):
        attend = functools.partial(triton.attend, target=TARGET)
        return kernel_cases.results(attend, at(*arguments))

    together = jax.vmap(run)(offsets, factors)
    for i, arguments in enumerate(zip(offsets, factors, strict=True)):
        actual = tuple(x[i] for x in together)
        kernel_cases.assert_agree(actual, kernel_cases.expected(at(*arguments)), np.float32)


def check_overflow(dtype: str) -> None:
    test_overflow.compare("triton", TARGET, jnp.dtype(dtype))


def check_block_max(name: str) -> None:
    case = test_block_max.CASES[name]
    only = Implementations("pallas_kernels.block_max", ("triton",))
    no_refusal = mock.patch.object(triton.triton_call, "refusal", return_value=None)
    with (
        targets.use(TARGET),
        mock.patch.object(block_max_api, "IMPLEMENTATIONS", only),
        no_refusal,
    ):
        test_block_max.assert_agree(case, *test_block_max.run(case, "triton"))


def check_golden(key: str) -> None:
    """S2-Attention against the official kernels."""
    no_refusal = mock.patch.object(triton.triton_call, "refusal", return_value=None)
    with targets.use(TARGET), no_refusal:
        test_s2.compare_attention(GOLDEN[key], "triton")


if __name__ == "__main__":
    triton_interpreter.run_checks(check, NAMES)
