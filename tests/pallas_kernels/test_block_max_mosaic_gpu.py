"""The Hopper kernel of block maxima: interpreted on a CPU, all but its products as they are."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_max_attention, targets
from pallas_kernels.block_max import mosaic_gpu
from pallas_kernels.block_max.call import IMPLEMENTATIONS, Call
from pallas_kernels.block_max.mosaic_gpu.plan import QUERY_TILE, WARPGROUPS, Plan
from pallas_kernels.block_max.mosaic_gpu.sight import Sight
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.geometry import Geometry
from pallas_kernels.kernel_tables import Segments
from pallas_kernels.targets import Target
from tests.pallas_kernels import gpu_interpreter, test_block_max
from tests.pallas_kernels.test_block_max import CASES, Case

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOPPER, SIMULATED = gpu_interpreter.HOPPER, gpu_interpreter.SIMULATED

# Small, as each block of a grid takes a second: every feature of the kernel once.
INTERPRETED_CASES = {
    "ragged, segments, groups, head of 80": Case(
        150, 150, 16, 32, batch=2, heads=2, kv_heads=1, head_dim=80, segments=3, dtype=jnp.bfloat16
    ),
    "rows, group, soft cap, window, two tiles of keys": Case(
        *(70, 290, None, 16),
        kv_heads=1,
        head_dim=256,
        dtype=jnp.float16,
        options={
            "group_reduction": "max",
            "logits_soft_cap": 0.7,
            "window_size": 90,
            "query_offset": 180,
        },
    ),
    "blocks of odd sizes, prefix, float32": Case(
        *(200, 190, 12, 10),
        heads=1,
        kv_heads=1,
        head_dim=192,
        options={"prefix_length": 90, "window_size": 110},
    ),
    "blocks of many tiles, group, bidirectional": Case(
        *(500, 1100, 300, 600, False),
        heads=2,
        kv_heads=1,
        segments=2,
        dtype=jnp.bfloat16,
        options={"group_reduction": "max"},
    ),
    "blocks of a tile, rows that see nothing": Case(
        *(140, 90, 64, 64), heads=1, kv_heads=1, dtype=jnp.float16, options={"query_offset": -70}
    ),
    "nothing visible": dataclasses.replace(
        CASES["nothing_visible"], heads=1, kv_heads=1, dtype=jnp.bfloat16
    ),
}


@pytest.mark.parametrize("name", INTERPRETED_CASES)
@pytest.mark.usefixtures("no_races")
@pytest.mark.representative("rows, group*")
def test_interpreted_kernel(name, monkeypatch):
    gpu_interpreter.compile_once(monkeypatch)
    case = INTERPRETED_CASES[name]
    with targets.use(SIMULATED):
        test_block_max.assert_agree(case, *test_block_max.run(case, "mosaic_gpu"))


@pytest.mark.exhaustive
def test_vmap_of_offsets_and_gradient(monkeypatch):
    gpu_interpreter.compile_once(monkeypatch)
    case = Case(24, 80, 8, 16, heads=2, kv_heads=1, dtype=jnp.bfloat16)
    query, key, _ = test_block_max.make(case)
    lse = jnp.full(query.shape[:3], 4.0)

    def run(implementation):
        def one(query, offset):
            options = {"query_offset": offset, "implementation": implementation}
            return block_max_attention(query, key, lse, **options, **case.arguments())

        def total(queries, offsets):
            maxima = jax.vmap(one)(queries, offsets)
            return maxima.sum(), maxima

        queries, offsets = jnp.stack([query, -query, 2 * query]), jnp.asarray([-3, 17, 56])
        return jax.jit(jax.grad(total, has_aux=True))(queries, offsets)

    with targets.use(gpu_interpreter.INTERPRETED):
        gradient, maxima = run("mosaic_gpu")
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_allclose(maxima, run("reference")[1], rtol=1e-4)


def call(case: Case) -> Call:
    query, key, segment_ids = test_block_max.make(case)
    options = dict(case.options)
    offset = options.pop("query_offset", case.keys - case.queries)
    limits = {"window_size": None} | {x: options[x] for x in options if x in LIMITS}
    geometry = Geometry(
        *(case.queries, case.keys, case.query_block_size or 1, case.key_block_size, case.is_causal),
        **limits,
    )
    lse = jnp.zeros(query.shape[:3])
    over_group = "group_reduction" in options
    return Call(
        query, key, lse, segment_ids, jnp.asarray(offset), geometry, Scores(1.0), over_group
    )


LIMITS = ("window_size", "prefix_length")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.representative(
    "ragged", "rows*", "blocks_of_odd_sizes", "prefix*", "segments", "window*", "over_group_rows"
)
def test_sight_is_what_pairs_say(name):
    """No visible tile is left out, and in a full one nothing is hidden."""
    given = call(CASES[name])
    plan = Plan.of(given, HOPPER)
    segments, offset = None, given.query_offset
    tokens = [x.token(np.arange(x.tiles * x.tile)) for x in (plan.queries, plan.keys)]
    visible = np.asarray(plan.geometry.pairs(offset + tokens[0][:, None], tokens[1]))[None]
    if given.segment_ids is not None:
        segments = Segments(*(ids[:, x] for ids, x in zip(given.segment_ids, tokens, strict=True)))
        visible = visible & (segments.query[:, :, None] == segments.key[:, None])
    shape = (-1, plan.queries.tiles, QUERY_TILE, plan.keys.tiles, plan.keys.tile)
    visible = np.asarray(visible).reshape(shape)
    some, every = (x.swapaxes(1, 2) for x in (visible.any((2, 4)), visible.all((2, 4))))
    sight = Sight.of(plan, offset, segments)
    start, stop, full_start, full_stop = (np.asarray(x)[..., None] for x in sight)
    tiles = np.arange(plan.queries.tiles)
    streamed = (start <= tiles) & (tiles < stop)
    assert not (some & ~streamed).any()
    assert not ((full_start <= tiles) & (tiles < full_stop) & ~every).any()
    if segments is None:
        assert (streamed == some).all()


@pytest.mark.parametrize("key_block", [8, 64, 1024])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_plans_fit_shared_memory(head_dim, dtype, key_block):
    case = dataclasses.replace(
        CASES["square"], head_dim=head_dim, dtype=jnp.dtype(dtype), key_block_size=key_block
    )
    plan = Plan.of(call(case), HOPPER)
    row = (6 if dtype == "float32" else 2) * (-(-head_dim // 64) * 64)
    maxima = 4 * WARPGROUPS * plan.columns * QUERY_TILE
    assert plan.stages >= (1 if (head_dim, dtype) == (256, "float32") else 2)
    assert (plan.keys.tile + plan.stages * QUERY_TILE) * row + maxima <= 224 * 1024


def test_hopper_takes_it():
    given = call(CASES["bfloat16"])
    with targets.use(HOPPER):
        choice = IMPLEMENTATIONS.choose(given, None)
    assert str(choice).splitlines() == [
        "pallas_tpu: needs a TPU, not cuda",
        "mosaic_gpu: taken on NVIDIA H200",
    ]


def test_refusals():
    given = call(CASES["bfloat16"])
    assert mosaic_gpu.refusal(given, HOPPER) is None
    assert "Hopper" in mosaic_gpu.refusal(given, Target("cpu"))
    ampere = Target("cuda", "NVIDIA A100", 80)
    assert "only Hopper has the wgmma" in mosaic_gpu.refusal(given, ampere)
    with targets.use(ampere):
        assert "mosaic_gpu" in IMPLEMENTATIONS.choose(given, None).refusals
    wide = dataclasses.replace(CASES["square"], head_dim=257)
    assert mosaic_gpu.refusal(call(wide), HOPPER) == "head_dim=257 must be at most 256"
    with jax.enable_x64(True):
        double = call(dataclasses.replace(CASES["square"], dtype=jnp.float64))
        assert "not float64" in mosaic_gpu.refusal(double, HOPPER)


def test_refuses_where_mosaic_cannot_be_imported(monkeypatch):
    from pallas_kernels.block_sparse_attention import mosaic_gpu as attention

    attention._import_error.cache_clear()
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
    reason = mosaic_gpu.refusal(call(CASES["bfloat16"]), HOPPER)
    attention._import_error.cache_clear()
    assert reason.startswith("Mosaic GPU cannot be imported: pip install")
