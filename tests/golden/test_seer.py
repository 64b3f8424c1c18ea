"""Block maxima against SeerAttention's ground truths, dense in float64 and of its kernels.

Everything comes from the files: other shapes, seeds and settings pass unchanged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockMask,
    Dense,
    block_max_attention,
    block_sparse_attention,
    targets,
)
from pallas_kernels.targets import Target
from tests.golden import loading

FILES = loading.settings("seer", "manifest.json")["files"]
NAMES = ("q_rope", "k_rope")
# The dtype decides how much is lost: logits are as large as 90.
IMPLEMENTATIONS = {"reference": np.float64, "xla": np.float64, "pallas_tpu": np.float32}
TOLERANCES = {"reference": 1e-6, "xla": 1e-6, "pallas_tpu": 2e-5}
KERNEL_TOLERANCE = 6e-6

attention = jax.jit(
    functools.partial(
        block_sparse_attention, is_causal=True, return_lse=True, implementation="reference"
    )
)


def cases(kind, array):
    names = [
        name
        for name, file in FILES.items()
        if file["config"]["kind"] == kind and array in file["arrays"]
    ]
    assert names
    return pytest.mark.parametrize("name", names)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def block_max(query, key, implementation, **options):
    """Returns the maxima of causal attention."""
    target = targets.current()
    if implementation == "pallas_tpu":
        target = Target("tpu", interpret=True)
    dense = BlockMask.from_rule(Dense(), query.shape[1], is_causal=True)
    run = jax.jit(
        functools.partial(
            block_max_attention, is_causal=True, implementation=implementation, **options
        )
    )
    with jax.enable_x64(True):
        query, key = (jnp.asarray(x, IMPLEMENTATIONS[implementation]) for x in (query, key))
        _, lse = attention(query, key, key, dense)
        with targets.use(target):
            return np.asarray(run(query, key, lse))


def agree(actual, stored, truth, implementation):
    tolerance = TOLERANCES[implementation]
    if truth.endswith("_kernel"):
        tolerance = max(tolerance, KERNEL_TOLERANCE)
    np.testing.assert_allclose(actual, stored, atol=tolerance, rtol=tolerance, err_msg=truth)


@cases("prefill", "gt_raw")
def test_prefill(name, implementation):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    size = config["block"]
    query, key = (stored[x] for x in NAMES)
    maxima = block_max(query, key, implementation, query_block_size=size, key_block_size=size)
    agree(maxima, stored["gt_raw"], "gt_raw", implementation)
    # Whole rows of blocks see something, and what the kernel gives are shares.
    shares = maxima / maxima.sum(-1, keepdims=True)
    for truth in {"gt", "gt_kernel"} & stored.keys():
        agree(shares, stored[truth], truth, implementation)


@cases("decode_train", "gt_tok")
def test_decode(name, implementation):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    starts = stored["cu_seqlens"]
    lengths = np.diff(starts)
    # Padding at the end: no token of a sequence sees it.
    query, key = (np.zeros((len(lengths), lengths.max(), *stored[x].shape[1:])) for x in NAMES)
    for sequence, length in enumerate(lengths):
        for padded, packed in zip((query, key), NAMES, strict=True):
            padded[sequence, :length] = stored[packed][starts[sequence] :][:length]
    options = {"query_block_size": None, "key_block_size": config["block"]}
    maxima = block_max(query, key, implementation, **options)
    groups = block_max(query, key, implementation, group_reduction="max", **options)
    past = np.where(stored["block_mask"], groups, 0)
    shares = past / (past.sum(-1, keepdims=True) + 1e-9)
    for sequence, length in enumerate(lengths):
        for truth in {"gt_tok", "gt_tok_kernel", "gt"} & stored.keys():
            actual = (shares if truth == "gt" else maxima)[sequence, :, :length]
            agree(actual, stored[truth][sequence, :, :length], truth, implementation)
