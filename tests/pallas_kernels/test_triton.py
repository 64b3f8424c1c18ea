"""What needs neither Triton nor PyTorch: reasons to refuse, and the choice of tiles."""

import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Dense, Local, Strided, kernel_tables, triton_call
from pallas_kernels.block_sparse_attention import triton
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.block_sparse_attention.triton import tuning
from pallas_kernels.block_sparse_attention.triton.spec import Spec
from pallas_kernels.block_sparse_attention.triton.tuning import Shape
from pallas_kernels.targets import Target
from tests.pallas_kernels import kernel_cases

HOPPER = Target("cuda", "NVIDIA H200", 90)
AMPERE = Target("cuda", "NVIDIA A100", 80)
DENSE = BlockMask.from_rule(Dense(), 1024, is_causal=True)


def blocks_of(size, length=1024):
    count = -(-length // size)
    chosen = np.ones((1, count, count), bool)
    return BlockMask.from_block_map(chosen, length, length, size, size, is_causal=True)


def refusal(target=HOPPER, head_dim=64, dtype=jnp.bfloat16, block_mask=DENSE):
    case = kernel_cases.Case(lambda: block_mask, head_dim=head_dim, dtype=dtype)
    with jax.enable_x64(dtype == jnp.float64):
        return triton.refusal(kernel_cases.make(case), target)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"target": Target("cpu")}, "needs an NVIDIA GPU, not cpu"),
        ({"target": Target("rocm", "gfx90a")}, "needs an NVIDIA GPU, not rocm"),
        (
            {"target": Target("cuda", "T4", 75)},
            "needs compute capability 8.0 (Ampere) or newer, not 7.5",
        ),
        ({"dtype": jnp.float64}, "it takes bfloat16, float16 and float32, not float64"),
        ({"head_dim": 320}, "head_dim=320 must be at most 256"),
        (
            {"block_mask": blocks_of(10)},
            "blocks of 10 x 10 tokens need more than 32 bits in tiles of 32 x 16",
        ),
    ],
)
def test_refusals(arguments, reason):
    assert refusal(**arguments) == reason


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("block_mask", [DENSE, blocks_of(16), blocks_of(96), blocks_of(20)])
def test_what_is_left_to_refuse_is_a_missing_extra(dtype, block_mask):
    assert refusal(dtype=dtype, block_mask=block_mask) == triton_call.refusal()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    triton_call.refusal.cache_clear()
    assert 'pip install "sparseformer_jax[triton]"' in triton_call.refusal()
    triton_call.refusal.cache_clear()


@pytest.mark.parametrize(
    ("version", "fits"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.1+git1", True), ("3.10.0", False), ("4.0.0", False)],
)
def test_other_versions_of_triton_are_refused(monkeypatch, version, fits):
    usable = types.SimpleNamespace(triton_lib=types.SimpleNamespace(CAN_USE_TRITON=True))
    monkeypatch.setitem(sys.modules, "jax_triton", usable)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    triton_call.refusal.cache_clear()
    reason = f'triton {version} must be 3.6 to 3.9: pip install "sparseformer_jax[triton]"'
    assert triton_call.refusal() == (None if fits else reason)
    triton_call.refusal.cache_clear()


def test_setup_asks_for_the_versions_that_are_not_refused():
    (major, oldest), (_, newest) = triton_call.OLDEST, triton_call.NEWEST
    setup = pathlib.Path(__file__).parents[2].joinpath("setup.cfg").read_text(encoding="utf-8")
    asked = [line.strip() for line in setup.splitlines() if line.strip().startswith("triton>")]
    assert set(asked) == {f"triton>={major}.{oldest},<{major}.{newest + 1}"}


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_machine_has_tiles_for_every_mask(capability, head_dim, dtype):
    masks = [DENSE, *(blocks_of(size) for size in (8, 16, 48, 64, 100, 128))]
    masks.append(BlockMask.from_rule(Strided(64, 4, 4), 1000, is_causal=True))
    for mask in masks:
        chosen = tuning.choose(mask, head_dim, jnp.dtype(dtype), Target("cuda", "", capability))
        for shape in (chosen.forward, chosen.d_query, chosen.d_key):
            assert kernel_tables.refusal(mask, *shape.tiles) is None
            assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in shape.tiles)


def test_tiles_follow_the_mask():
    def forward(mask, target=HOPPER):
        return tuning.choose(mask, 128, jnp.dtype(jnp.bfloat16), target).forward.tiles

    assert forward(DENSE) == (128, 128)
    assert forward(DENSE, AMPERE) == (128, 64)
    assert forward(BlockMask.from_rule(Local(512), 4096, is_causal=True)) == (128, 128)
    # Stripes of 64 keys; rows of a rule are alike, those of a selection are not.
    assert forward(BlockMask.from_rule(Strided(64, 8, 8), 4096, is_causal=True)) == (128, 64)
    assert forward(blocks_of(64)) == (64, 64)
    assert forward(blocks_of(16)) == (64, 32)
    # Parts of 4 tokens: 8 x 4 of them fill a word.
    assert forward(blocks_of(100)) == (32, 16)


@pytest.mark.parametrize("block_mask", [DENSE, blocks_of(64), blocks_of(20)])
def test_plans_start_with_the_default(block_mask):
    call = kernel_cases.make(kernel_cases.Case(lambda: block_mask, dtype=jnp.bfloat16))
    plans = triton.plans(call, HOPPER)
    chosen = tuning.choose(block_mask, 64, call.query.dtype, HOPPER)
    assert plans[0].options == chosen
    assert plans[0].forward == chosen.forward.tiling(block_mask)
    assert 3 < len(plans) == len(set(plans)) < 20


@pytest.mark.parametrize("head_dim", [8, 64, 80, 192, 256])
def test_width_is_a_power_of_two(head_dim):
    assert spec(head_dim=head_dim).head_width == max(16, 2 ** int(np.ceil(np.log2(head_dim))))


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(-0.3), Scores(0.3, 5.0), Scores(-0.3, 5.0)])
def test_factor_is_positive_and_gives_base_2_logits(scores):
    one, raw = spec(scores=scores), jnp.linspace(-40, 40, 7)
    x = jnp.tanh(raw * one.slant) if one.is_capped else raw * one.slant
    assert one.factor > 0
    np.testing.assert_allclose(x * one.factor, scores.logits(raw) * np.log2(np.e), rtol=1e-5)


def spec(head_dim=64, scores=None):
    tiling = Shape(64, 64, 4, 2).tiling(DENSE)
    return Spec(
        tiling=tiling,
        geometry=DENSE.geometry,
        scores=scores or Scores(0.1),
        queries=1024,
        keys=1024,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        lists=(1, 1, 16, 16),
        offsets_have_batch=False,
        has_segments=False,
        precision="ieee",
    )
