"""The Hopper kernels on a CPU: their arithmetic alone, and all but WGMMA interpreted."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import BlockMask, Dense, Local, block_sparse_attention, targets
from pallas_kernels.block_sparse_attention import mosaic_gpu
from pallas_kernels.block_sparse_attention.mosaic_gpu import softmax, tuning
from pallas_kernels.block_sparse_attention.mosaic_gpu.masks import TileMask
from pallas_kernels.block_sparse_attention.mosaic_gpu.softmax import Running
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import ROWS
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.geometry import Geometry
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target
from tests.pallas_kernels import gpu_interpreter, kernel_cases, list_loops
from tests.pallas_kernels.kernel_cases import CASES, Case

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOPPER, SIMULATED = gpu_interpreter.HOPPER, gpu_interpreter.SIMULATED


def rule(rule, *lengths, **limits):
    return lambda: BlockMask.from_rule(rule, *lengths, **({"is_causal": True} | limits))


def block_map(*shape, size, **limits):
    limits = {"is_causal": False} | limits

    def build():
        given = np.random.default_rng(1).random(shape) < 0.6
        given[..., -1, :] = False
        lengths = (n * size - 5 for n in shape[-2:])
        return BlockMask.from_block_map(given, *lengths, size, size, **limits)

    return build


# Small, as each block of a grid takes a second: every feature of the kernels once.
INTERPRETED_CASES = {
    "segments, soft cap, pattern per batch": Case(
        block_map(2, 2, 3, 3, size=64, is_causal=True),
        batch=2,
        segments=2,
        soft_cap=1.5,
    ),
    "window, pattern per query head": Case(
        block_map(2, 6, 6, size=32, is_causal=True, window_size=75), dtype=jnp.float16
    ),
    "heads of a group side by side, pattern per group": Case(
        block_map(2, 3, 3, size=64, is_causal=True),
        heads=4,
        kv_heads=2,
        segments=2,
        dtype=jnp.bfloat16,
    ),
    "wide tiles, long lists, negative scale": Case(
        rule(Dense(), 250, 700, is_causal=False), heads=1, scale=-0.1, dtype=jnp.bfloat16
    ),
    "prefix, head of 80, groups": Case(
        rule(Local(64, left=1, right=9), 190, prefix_length=70),
        heads=4,
        kv_heads=2,
        head_dim=80,
        dtype=jnp.bfloat16,
    ),
    "float32 in one stage": Case(rule(Local(64, left=2), 130), heads=1, head_dim=128),
    "float32, head of 256": Case(rule(Local(64, left=2), 130), heads=1, head_dim=256),
    "float32, head of 192, groups": Case(
        block_map(1, 2, 3, size=64), heads=2, head_dim=192, segments=2
    ),
    "head of 256, nothing seen": Case(
        rule(Local(64, left=2), 130, query_offset=-40), heads=1, head_dim=256, dtype=jnp.bfloat16
    ),
}


@pytest.mark.parametrize("name", INTERPRETED_CASES)
@pytest.mark.usefixtures("no_races")
@pytest.mark.representative("segments, soft cap*")
def test_interpreted_kernels_agree_with_reference(name, monkeypatch):
    """All of them, rings, barriers and lists included; only products are simulated.

    Barriers order all that a warpgroup reads and writes, and what TMA does.
    """
    gpu_interpreter.compile_once(monkeypatch)
    case = INTERPRETED_CASES[name]
    call = kernel_cases.make(case)
    assert mosaic_gpu.refusal(call, SIMULATED) is None
    actual = kernel_cases.results(functools.partial(mosaic_gpu.attend, target=SIMULATED), call)
    kernel_cases.assert_agree(actual, kernel_cases.expected(call), case.dtype)


def test_grids_have_the_one_axis_that_holds_any_batch(monkeypatch):
    """MASFormer's blocks are a batch; CUDA ends the second and third axis at 65535."""
    grids, kernel = [], plgpu.kernel

    def record(*arguments, grid, **options):
        grids.append(grid)
        return kernel(*arguments, grid=grid, **options)

    monkeypatch.setattr(plgpu, "kernel", record)
    batch, heads, length = 70_000, 2, 256
    mask = BlockMask.from_rule(Dense(), length, is_causal=True)
    attend = functools.partial(
        block_sparse_attention, block_mask=mask, is_causal=True, implementation="mosaic_gpu"
    )
    shape = jax.ShapeDtypeStruct((batch, length, heads, 64), jnp.bfloat16)
    with targets.use(HOPPER):
        jax.eval_shape(lambda *arrays: jax.vjp(attend, *arrays)[1](arrays[0]), *[shape] * 3)
    assert len(grids) == 3
    for (blocks,) in grids:
        assert blocks > batch * heads


def test_races_are_told(capsys):
    """Two warpgroups write what neither has to wait for."""

    def body(out, shared):
        shared[...] = jnp.full(ROWS, lax.axis_index("warpgroup"))
        out[...] = shared[...]

    plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        scratch_types=[plgpu.SMEM((ROWS,), jnp.int32)],
        num_threads=2,
        thread_name="warpgroup",
        interpret=SIMULATED.interpret,
    )()
    assert "RACE DETECTED" in capsys.readouterr().out


GEOMETRIES = {
    "causal": {"is_causal": True, "window_size": None},
    "anticausal": {"is_causal": False, "window_size": None, "is_anticausal": True},
    "window": {"is_causal": False, "window_size": 70},
    "causal window": {"is_causal": True, "window_size": 70},
    "prefix": {"is_causal": True, "window_size": None, "prefix_length": 150},
    "prefix, window": {"is_causal": True, "window_size": 90, "prefix_length": 150},
    "all": {"is_causal": False, "window_size": None},
}
TILINGS = (
    Tiling(128, 128, 128, 128),
    Tiling(128, 64, 64, 16),
    Tiling(64, 128, 32, 32),
    Tiling(128, 64, 32, 8),
)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("rows_are_queries", [True, False])
def test_masks_mean_what_the_lists_say(name, rows_are_queries):
    """Of every tile, for each 64 rows of it, with and without bits set."""
    geometry = Geometry(300, 290, 16, 16, **GEOMETRIES[name])
    rng = np.random.default_rng(0)
    for tiling in TILINGS:
        tile_mask = TileMask(geometry, tiling, rows_are_queries)
        compare = jax.jit(functools.partial(visible, tile_mask))
        shape = (tiling.query_tile, tiling.key_tile)
        for m, j in np.ndindex(-(-300 // shape[0]), -(-290 // shape[1])):
            bits = np.int32(rng.integers(1, 2 ** (tiling.query_granules * tiling.key_granules)))
            bits = bits if (m + j) % 2 else np.int32(1)
            offset = -20
            expected = list_loops._mask(
                types.SimpleNamespace(geometry=geometry),
                tiling,
                types.SimpleNamespace(query_offset=[offset], segments=None),
                *(0, m, j, int(bits)),
            )
            expected = expected if rows_are_queries else expected.T
            for part in range(expected.shape[0] // ROWS):
                own = expected[part * ROWS : (part + 1) * ROWS]
                mask, sees_some = compare(bits, m, j, part, offset)
                np.testing.assert_array_equal(mask, own)
                assert sees_some or not own.any()


def visible(tile_mask, bits, m, j, part, offset):
    """Returns the mask of 64 rows of tile (m, j), and whether it may show anything."""
    tiling = tile_mask.tiling
    query = (m * tiling.query_tile + offset, tiling.query_tile)
    key = (j * tiling.key_tile, tiling.key_tile)
    (start, _), (base, width) = (query, key) if tile_mask.rows_are_queries else (key, query)
    rows = jnp.arange(ROWS) + part * ROWS
    columns = jnp.arange(width)
    mask = tile_mask.within(start + rows, columns, base)
    allowed = tile_mask.allows(bits, rows, columns)
    mask = mask if allowed is None else mask & allowed
    return mask, tile_mask.sees_some(bits, part, start + part * ROWS, base)


def test_a_warpgroup_skips_what_only_the_other_sees():
    tile_mask = TileMask(Geometry(256, 256, 64, 64, True, None), Tiling(128, 64, 64, 64), True)

    def sees(bits, part, base):
        numbers = (jnp.int32(n) for n in (bits, part, part * ROWS, base))
        return bool(tile_mask.sees_some(*numbers))

    # Bit 0 is of the first 64 rows, bit 1 of the last.
    assert not sees(0b10, part=0, base=0)
    assert sees(0b10, part=1, base=0)
    # Above the diagonal, and below it.
    assert not sees(0b11, part=0, base=64)
    assert sees(0b11, part=1, base=64)


SCORES = [Scores(0.3), Scores(0.3, 2.0), Scores(-0.2), Scores(0.0), Scores(-0.2, 0.5)]


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_online_softmax(scores):
    """Tile by tile it is the softmax, and rows that see nothing are told apart."""
    rng = np.random.default_rng(0)
    raw = jnp.asarray(10 * rng.standard_normal((ROWS, 96)), jnp.float32)
    mask = jnp.asarray(rng.random(raw.shape) < 0.3).at[5].set(False)
    running = Running(jnp.full(ROWS, softmax.LOWEST), jnp.zeros(ROWS))
    sums = jnp.zeros((ROWS, 8))
    values = jnp.asarray(rng.standard_normal((96, 8)), jnp.float32)
    for start in range(0, 96, 32):
        columns = slice(start, start + 32)
        logits = softmax.raw_logits(scores, raw[:, columns])
        logits = jnp.where(mask[:, columns], logits, -jnp.inf)
        running, shrink, weights = running.add(logits, softmax.factor(scores))
        sums = sums * shrink[:, None] + weights @ values[columns]
    scale, lse = running.finish()
    logits = jnp.where(mask, scores.logits(raw), -jnp.inf)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, axis=1), atol=2e-5)
    weights = jnp.where(mask, jnp.exp(logits - jnp.where(mask, lse[:, None], 0)), 0)
    np.testing.assert_allclose(sums * scale[:, None], weights @ values, atol=2e-5)


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_gradient_of_a_tile(scores):
    rng = np.random.default_rng(0)
    raw, d_weights = (jnp.asarray(rng.standard_normal((ROWS, 32)), jnp.float32) for _ in range(2))
    lse = jax.nn.logsumexp(scores.logits(raw), axis=1)
    shift = jnp.sum(jnp.exp(scores.logits(raw) - lse[:, None]) * d_weights, axis=1)
    columns = (softmax.LOG2_E * lse[:, None], shift[:, None])
    lse_2, shifts = (jnp.broadcast_to(x, raw.shape) for x in columns)
    logits, weights = softmax.weights(scores, raw, lse_2)
    actual = scores.scale * softmax.gradient(scores, logits, weights, d_weights, shifts)
    expected = jax.grad(
        lambda raw: jnp.sum(jax.nn.softmax(scores.logits(raw), axis=1) * d_weights)
    )(raw)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_refusals():
    call = kernel_cases.make(CASES["bfloat16"])
    assert mosaic_gpu.refusal(call, HOPPER) is None
    assert "Hopper" in mosaic_gpu.refusal(call, Target("tpu", "TPU v5e"))
    for capability in (80, 100):
        reason = mosaic_gpu.refusal(
            call, dataclasses.replace(HOPPER, compute_capability=capability)
        )
        assert "only Hopper has the wgmma" in reason
    wide = dataclasses.replace(CASES["bfloat16"], head_dim=257)
    reason = mosaic_gpu.refusal(kernel_cases.make(wide), HOPPER)
    assert reason == "head_dim=257 must be at most 256"
    fine = Case(block_map(1, 12, 12, size=8, is_causal=True), dtype=jnp.bfloat16)
    assert "more than 32 bits" in mosaic_gpu.refusal(kernel_cases.make(fine), HOPPER)


def test_refuses_where_mosaic_cannot_be_imported(monkeypatch):
    mosaic_gpu._import_error.cache_clear()
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
    reason = mosaic_gpu.refusal(kernel_cases.make(CASES["bfloat16"]), HOPPER)
    mosaic_gpu._import_error.cache_clear()
    assert reason.startswith("Mosaic GPU cannot be imported: pip install")


@pytest.mark.parametrize(
    ("size", "patterns", "tile", "heads", "takes_turns"),
    [
        (64, 2, 64, 2, True),  # two heads of a group have one list
        (64, 1, 64, 2, True),
        (64, 4, 128, 1, False),  # each its own: 128 rows meet what either half wants
        (128, 2, 128, 1, True),
    ],
)
def test_warpgroups_share_a_list(size, patterns, tile, heads, takes_turns):
    case = Case(block_map(patterns, 5, 5, size=size), heads=4, kv_heads=2, dtype=jnp.bfloat16)
    plan = mosaic_gpu.plans(kernel_cases.make(case), HOPPER)[0]
    assert plan.forward.query_tile == plan.d_query.query_tile == tile
    options = plan.options
    assert options.forward_heads == options.d_query_heads == heads
    assert options.takes_turns == takes_turns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_plans_fit_shared_memory(head_dim, dtype):
    case = dataclasses.replace(CASES["bfloat16"], head_dim=head_dim, dtype=jnp.dtype(dtype))
    call = kernel_cases.make(case)
    plans = mosaic_gpu.plans(call, HOPPER)
    # Wide heads of float32 may leave room for one.
    is_wide = dtype == "float32" and head_dim > 128
    assert len(set(plans)) == len(plans) >= (1 if is_wide else 2)
    sizes = tuning.tiles(call)
    assert sizes == tuple((t.query_tile, t.key_tile) for t in tilings(plans[0]))
    head = -(-head_dim // 64) * 64
    own, streamed = (4, 6) if dtype == "float32" else (2, 2)
    for plan in plans:
        options = plan.options
        stages = (options.forward_stages, options.d_query_stages, options.d_key_stages)
        # float32 may leave room for no more than one.
        assert all((1 if dtype == "float32" else 2) <= n <= 4 for n in stages)
        forward, d_query, d_key = tilings(plan)
        tokens = (
            (options.forward_heads * forward.query_tile, forward.key_tile),
            (2 * options.d_query_heads * d_query.query_tile, d_query.key_tile),
            (2 * d_key.key_tile, d_key.query_tile),
        )
        for (stay, pass_by), depth in zip(tokens, stages, strict=True):
            assert head * (own * stay + streamed * 2 * depth * pass_by) <= 227 * 1024


def tilings(plan):
    return plan.forward, plan.d_query, plan.d_key
