"""Block maxima against SeerAttention's ground truths, dense in float64 and of its kernels.

Everything comes from the files: other shapes, seeds and settings pass unchanged.
"""

import dataclasses
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
from tests.pallas_kernels import gpu_interpreter

FILES = loading.settings("seer", "manifest.json")["files"]
NAMES = ("q_rope", "k_rope")
KERNEL_TOLERANCE = 6e-6


@dataclasses.dataclass(frozen=True)
class Way:
    """An implementation, in a dtype that decides how much is lost: logits are as large as 90."""

    implementation: str
    dtype: str
    tolerance: float
    target: Target | None = None

    def __str__(self):
        return f"{self.implementation}-{self.dtype}"


HOPPER = gpu_interpreter.INTERPRETED
WAYS = [
    Way("reference", "float64", 1e-6),
    Way("xla", "float64", 1e-6),
    Way("pallas_tpu", "float32", 2e-5, Target("tpu", interpret=True)),
    Way("mosaic_gpu", "float32", 2e-5, HOPPER),
    Way("mosaic_gpu", "float16", 2e-3, HOPPER),
]

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


@pytest.fixture(params=WAYS, ids=str)
def way(request, monkeypatch):
    gpu_interpreter.compile_once(monkeypatch)
    return request.param


def block_max(query, key, way, **options):
    """Returns the maxima of causal attention."""
    dense = BlockMask.from_rule(Dense(), query.shape[1], is_causal=True)
    run = jax.jit(
        functools.partial(
            block_max_attention, is_causal=True, implementation=way.implementation, **options
        )
    )
    with jax.enable_x64(way.dtype == "float64"):
        query, key = (jnp.asarray(x, way.dtype) for x in (query, key))
        _, lse = attention(query, key, key, dense)
        with targets.use(way.target or targets.current()):
            return np.asarray(run(query, key, lse))


def agree(actual, stored, truth, way):
    tolerance = way.tolerance
    if truth.endswith("_kernel"):
        tolerance = max(tolerance, KERNEL_TOLERANCE)
    np.testing.assert_allclose(actual, stored, atol=tolerance, rtol=tolerance, err_msg=truth)


@cases("prefill", "gt_raw")
@pytest.mark.representative("reference-*", "xla-*", "pallas_tpu-*", "mosaic_gpu-float16-*kernel*")
def test_prefill(name, way):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    size = config["block"]
    query, key = (stored[x] for x in NAMES)
    maxima = block_max(query, key, way, query_block_size=size, key_block_size=size)
    agree(maxima, stored["gt_raw"], "gt_raw", way)
    # Whole rows of blocks see something, and what the kernel gives are shares.
    shares = maxima / maxima.sum(-1, keepdims=True)
    for truth in {"gt", "gt_kernel"} & stored.keys():
        agree(shares, stored[truth], truth, way)


@cases("decode_train", "gt_tok")
@pytest.mark.representative(
    "reference-*", "xla-*", "pallas_tpu-*qproj*", "mosaic_gpu-float16-*kernel*"
)
def test_decode(name, way):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    starts = stored["cu_seqlens"]
    lengths = np.diff(starts)
    # Padding at the end: no token of a sequence sees it.
    query, key = (np.zeros((len(lengths), lengths.max(), *stored[x].shape[1:])) for x in NAMES)
    for sequence, length in enumerate(lengths):
        for padded, packed in zip((query, key), NAMES, strict=True):
            padded[sequence, :length] = stored[packed][starts[sequence] :][:length]
    options = {"query_block_size": None, "key_block_size": config["block"]}
    maxima = block_max(query, key, way, **options)
    groups = block_max(query, key, way, group_reduction="max", **options)
    past = np.where(stored["block_mask"], groups, 0)
    shares = past / (past.sum(-1, keepdims=True) + 1e-9)
    for sequence, length in enumerate(lengths):
        for truth in {"gt_tok", "gt_tok_kernel", "gt"} & stored.keys():
            actual = (shares if truth == "gt" else maxima)[sequence, :, :length]
            agree(actual, stored[truth][sequence, :, :length], truth, way)
