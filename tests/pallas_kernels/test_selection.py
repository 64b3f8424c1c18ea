"""Which implementation is taken, why, and what a mistake says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Dense, Local, block_sparse_attention, explain, targets
from pallas_kernels.targets import Target

HOPPER = Target("cuda", "NVIDIA H200", 90)
AMPERE = Target("cuda", "NVIDIA A100", 80)
TPU = Target("tpu", "TPU v5e")
SPARSE = BlockMask.from_rule(Local(64, left=2), 256, is_causal=True)
BY_NAME = ("cudnn", "mosaic_gpu")
DENSE = BlockMask.from_rule(Dense(), 256, is_causal=True)


def shapes(dtype=jnp.bfloat16, head_dim=64):
    return [jax.ShapeDtypeStruct((1, 256, heads, head_dim), dtype) for heads in (4, 2, 2)]


def explained(target, block_mask=SPARSE, dtype=jnp.bfloat16, head_dim=64, **options):
    with targets.use(target):
        return explain(*shapes(dtype, head_dim), block_mask, is_causal=True, **options)


def test_a_cpu_takes_xla():
    choice = explain(*shapes(), SPARSE, is_causal=True)
    assert choice.taken == "xla"
    assert {"pallas_tpu", "cudnn", "mosaic_gpu", "triton"} == choice.refusals.keys()
    assert str(choice).splitlines()[-1] == "xla: taken on cpu"


@pytest.mark.parametrize(
    ("target", "block_mask", "options", "taken"),
    [
        (TPU, SPARSE, {}, "pallas_tpu"),
        (HOPPER, DENSE, {}, "mosaic_gpu"),
        (HOPPER, DENSE, {"implementation": BY_NAME}, "cudnn"),
        (HOPPER, SPARSE, {}, "mosaic_gpu"),
        (HOPPER, DENSE, {"implementation": BY_NAME, "logits_soft_cap": 3.0}, "mosaic_gpu"),
        (HOPPER, DENSE, {"implementation": BY_NAME, "return_lse": True}, "mosaic_gpu"),
        (AMPERE, DENSE, {"head_dim": 256, "implementation": ("cudnn", "xla")}, "xla"),
        (Target("rocm", "gfx90a"), SPARSE, {}, "xla"),
    ],
)
def test_the_best_that_can_run(target, block_mask, options, taken):
    assert explained(target, block_mask, **options).taken == taken


@pytest.mark.parametrize(
    ("flags", "taken"),
    [
        ("", "mosaic_gpu"),
        ("--xla_gpu_deterministic_ops=false", "mosaic_gpu"),
        ("--xla_a=1 --xla_gpu_deterministic_ops --xla_b=2", "cudnn"),
        ("--xla_gpu_exclude_nondeterministic_ops=true", "cudnn"),
    ],
)
def test_cudnn_is_taken_unasked_only_where_xla_makes_it_deterministic(monkeypatch, flags, taken):
    """XLA reads its flags, and tells cuDNN for all of a program."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    choice = explained(HOPPER, DENSE)
    assert choice.taken == taken
    if taken != "cudnn":
        assert "its gradients change from run to run" in choice.refusals["cudnn"]


def test_float32_goes_to_a_kernel_that_keeps_its_digits():
    choice = explained(HOPPER, SPARSE, dtype=jnp.float32)
    assert choice.taken in ("triton", "xla")
    assert "float32 gradients" in choice.refusals["mosaic_gpu"]
    named = explained(HOPPER, SPARSE, dtype=jnp.float32, implementation="mosaic_gpu")
    assert named.taken == "mosaic_gpu"


def test_a_batch_longer_than_an_axis_of_cudas_grids_is_not_sent_to_cudnn():
    arrays = [jax.ShapeDtypeStruct((70_000, *x.shape[1:]), x.dtype) for x in shapes()]
    with targets.use(HOPPER):
        choice = explain(*arrays, DENSE, is_causal=True, implementation=BY_NAME)
    assert choice.taken == "mosaic_gpu"
    assert choice.refusals["cudnn"].startswith("batch=70000 must be at most 65535")


def test_every_tile_listed_is_dense_whoever_listed_it():
    full = np.tril(np.ones((1, 4, 4), bool))
    whole = BlockMask.from_block_map(full, 256, 256, 64, 64, is_causal=True)
    assert explained(HOPPER, whole, implementation=BY_NAME).taken == "cudnn"
    full[0, 3, 0] = False
    gap = BlockMask.from_block_map(full, 256, 256, 64, 64, is_causal=True)
    assert "leaves tiles out" in explained(HOPPER, gap).refusals["cudnn"]


def test_as_many_tiles_as_dense_attention_are_not_those_of_dense_attention():
    other = np.array([[[False, True], [True, True]]])
    mask = BlockMask.from_block_map(other, 256, 256, 128, 128, is_causal=False)
    assert "leaves tiles out" in explained(HOPPER, mask).refusals["cudnn"]


def test_dense_masks_go_to_jax_nn_whole(monkeypatch):
    """What cuDNN would compute is what `reference` computes."""
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal((1, 256, heads, 64)), jnp.float16) for heads in (4, 2, 2)
    ]
    dense = jax.nn.dot_product_attention

    def as_cudnn(*args, implementation, **options):
        assert implementation == "cudnn"
        return dense(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    attend = functools.partial(block_sparse_attention, *arrays, DENSE, is_causal=True, scale=0.3)
    with targets.use(HOPPER):
        out = attend(implementation="cudnn")
    np.testing.assert_allclose(out, attend(implementation="reference"), atol=3e-3)


def test_a_named_one_that_cannot_run_says_why():
    arrays = [jnp.zeros(x.shape, jnp.float32) for x in shapes()]
    with pytest.raises(NotImplementedError, match=r"^pallas_tpu: .*; none can run on cpu"):
        block_sparse_attention(*arrays, SPARSE, is_causal=True, implementation="pallas_tpu")
    with targets.use(HOPPER), pytest.raises(NotImplementedError, match="float16 and bfloat16"):
        block_sparse_attention(*arrays, DENSE, is_causal=True, implementation="cudnn")


@pytest.mark.parametrize("name", ["flash", ["xla", "flash"], []])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"implementation=.* must name one or more of .*'xla'"):
        explained(HOPPER, implementation=name)
