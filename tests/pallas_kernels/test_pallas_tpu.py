"""The Pallas kernels for TPU, interpreted on a CPU, against `reference` in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    BlockMask,
    Dense,
    Local,
    Strided,
    block_sparse_attention,
    kernel_tables,
    targets,
)
from pallas_kernels.block_sparse_attention import pallas_tpu, reference
from pallas_kernels.block_sparse_attention.pallas_tpu import flat, lists, strided, tuning
from pallas_kernels.kernel_tables import Segments, Tiling
from pallas_kernels.targets import Target
from tests.pallas_kernels import kernel_cases
from tests.pallas_kernels.kernel_cases import CASES, Case

pytestmark = pytest.mark.usefixtures("quick_compilation")

INTERPRETED = Target("tpu", interpret=True)
SIMULATED = Target("tpu", interpret=pltpu.InterpretParams(detect_races=True))
# Different for each kernel, and small: rows of several tiles, lists of several entries.
TILES = [(64, 128), (128, 64), (64, 64)]


def attend(call, target=INTERPRETED):
    """Attention by lists in those tiles."""
    return lists.run(lists.plan(call, target, TILES), call)


def assert_agrees(call, results):
    kernel_cases.assert_agree(results, kernel_cases.expected(call), call.query.dtype)


def assert_equal(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.representative(
    "dense_longer_keys",
    "segments",
    "strided",
    "bfloat16",
)
def test_agrees_with_reference(name):
    call = kernel_cases.make(CASES[name])
    assert_agrees(call, kernel_cases.results(attend, call))


@pytest.mark.parametrize(
    "name",
    [
        "dense_longer_keys",
        "random_ragged",
        "pattern_per_batch",
        "prefix",
        "segments",
        "head_dim_80",
    ],
)
@pytest.mark.representative("random_ragged")
def test_heads_with_one_list_side_by_side(name):
    call = kernel_cases.make(CASES[name])

    def side_by_side(call):
        return lists.run(lists.plan(call, INTERPRETED, TILES, heads=2), call)

    assert_agrees(call, kernel_cases.results(side_by_side, call))


@pytest.mark.parametrize("heads", [8, 2])
def test_heads_of_a_group_share_tiles_where_neighbours_differ(heads):
    """Tiles of many blocks of 64 skip nothing where a tenth of them is kept at random."""
    block_map = np.random.default_rng(0).random((2, 128, 128)) < 0.1
    sizes = (8192, 8192, 64, 64)
    selected = BlockMask.from_block_map(block_map, *sizes, is_causal=True)
    traced = jax.eval_shape(
        lambda indices: BlockMask.from_top_k(indices, *sizes, is_causal=True),
        jax.ShapeDtypeStruct((2, 128, 12), jnp.int32),
    )
    arrays = [jnp.zeros((1, 8192, n, 64), jnp.bfloat16) for n in (heads, 2, 2)]
    call = dataclasses.replace(
        _call(selected), **dict(zip(("query", "key", "value"), arrays, strict=True))
    )
    for block_mask in (selected, traced):
        choice = tuning.choose(dataclasses.replace(call, block_mask=block_mask))
        assert choice.heads == heads // 2
        assert heads == 2 or choice.tiles == (64, 128)


@pytest.mark.parametrize("name", ["pattern_per_query_head", "segments"])
@pytest.mark.usefixtures("no_races")
@pytest.mark.representative("pattern_per_query_head")
def test_agrees_in_simulated_memory(name):
    """Buffers start as NaN there, and races or reading beyond an array are errors."""
    call = kernel_cases.make(CASES[name])
    simulated = functools.partial(attend, target=SIMULATED)
    assert_agrees(call, kernel_cases.results(simulated, call))


@pytest.mark.parametrize(("name", "visits"), [("pattern_per_batch", 20), ("random_ragged", 6)])
@pytest.mark.representative("pattern*")
def test_lists_beyond_scalar_memory_are_walked_in_chunks(name, visits, monkeypatch):
    monkeypatch.setattr(flat, "MOST_VISITS", visits)
    call = kernel_cases.make(CASES[name])
    assert_agrees(call, kernel_cases.results(attend, call))


def test_chunks_hold_as_much_as_fits(monkeypatch):
    def chunk(*shape):
        return flat.Chunk.of(flat.Lists(np.zeros(shape[:4]), *[np.zeros(shape)] * 2))

    monkeypatch.setattr(flat, "MOST_VISITS", 100)
    assert chunk(4, 2, 5, 1, 2) == flat.Chunk(4, 2, 5)
    assert chunk(6, 2, 5, 1, 3) == flat.Chunk(3, 2, 5)
    assert chunk(4, 6, 5, 2, 2) == flat.Chunk(1, 3, 5)
    assert chunk(4, 6, 7, 2, 10) == flat.Chunk(1, 1, 4)
    assert chunk(1, 1, 7, 2, 60) == flat.Chunk(1, 1, 1)
    # Three rows would be one chunk in two, but with 120 visits.
    assert chunk(1, 1, 5, 1, 40) == flat.Chunk(1, 1, 2)


def _traced_call(seed):
    call = kernel_cases.make(CASES["pattern_per_query_head"])
    block_map = np.random.default_rng(seed).random((4, 4, 4)) < 0.5
    block_mask = BlockMask.from_block_map(block_map, 256, 256, 64, 64, is_causal=True)
    return dataclasses.replace(call, block_mask=block_mask)


def test_traced_masks_share_a_compilation():
    def out(call, block_map, *arrays):
        block_mask = BlockMask.from_block_map(block_map, 256, 256, 64, 64, is_causal=True)
        one = dataclasses.replace(call, block_mask=block_mask)
        return attend(
            dataclasses.replace(one, **dict(zip(("query", "key", "value"), arrays, strict=True)))
        )

    call = _traced_call(0)
    run = jax.jit(functools.partial(out, call))
    for seed in (0, 1):
        call = _traced_call(seed)
        found = run(call.block_mask.block_map(), call.query, call.key, call.value)
        assert_equal(found, kernel_cases.expected(call)[:2])
    assert run._cache_size() == 1


def _gradients(function, *arrays):
    return jax.grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), argnums=(0, 1, 2))(*arrays)


def test_vmap_and_remat():
    call = kernel_cases.make(CASES["random_ragged"])
    arrays = (call.query, call.key, call.value)
    mapped = [jnp.stack([x, 2 * x]) for x in arrays]

    def out(attend, query, key, value):
        return attend(dataclasses.replace(call, query=query, key=key, value=value))[0]

    remat = jax.checkpoint(functools.partial(out, attend))
    together = jax.jit(jax.vmap(functools.partial(_gradients, remat)))(*mapped)
    naive = functools.partial(out, functools.partial(reference.attend, target=INTERPRETED))
    assert_equal([x[0] for x in together], _gradients(naive, *arrays))


@pytest.mark.skipif(
    jax.__version_info__[:2] == (0, 11),
    reason="Shardy of jaxlib 0.11 crashes on an interpreted kernel's loop over a traced grid",
)
def test_shards_of_batch_and_heads():
    block_mask = BlockMask.from_rule(Strided(64, 2, 4, 2, phase_by="kv_head"), 128, is_causal=True)
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal((2, 128, heads, 64)), jnp.float32) for heads in (4, 2, 2)
    ]
    mesh = jax.make_mesh(
        (2, 2),
        ("data", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:4],
    )
    spec = jax.P("data", None, "tensor")

    def out(block_map, query, key, value):
        local = BlockMask.from_block_map(block_map, 128, 128, 64, 64, is_causal=True)
        with targets.use(INTERPRETED):
            return block_sparse_attention(
                query, key, value, local, is_causal=True, implementation="pallas_tpu"
            )

    block_map = jnp.asarray(block_mask.block_map())
    sharded = jax.shard_map(
        out, mesh=mesh, in_specs=(jax.P("tensor"), *[spec] * 3), out_specs=spec, check_vma=False
    )
    found = jax.jit(functools.partial(_gradients, functools.partial(sharded, block_map)))(*arrays)
    expected = _gradients(
        lambda *arrays: block_sparse_attention(
            *arrays, block_mask, is_causal=True, implementation="reference"
        ),
        *arrays,
    )
    assert_equal(found, expected)


STRIPED = {
    "heads": Case(kernel_cases._rule(Strided(32, 3, 4, left=2), 200), heads=4, kv_heads=2),
    "groups": Case(
        kernel_cases._rule(Strided(16, 4, 4, 2, offset=1, dense_heads=1, phase_by="kv_head"), 150),
        batch=2,
        heads=4,
        kv_heads=2,
    ),
    "chunk": Case(
        kernel_cases._rule(Strided(64, 2, 4, homo_head=True), 128, 384, query_offset=128),
        heads=4,
        kv_heads=2,
        segments=2,
    ),
    "segments": Case(
        kernel_cases._rule(Strided(16, 3, 4, left=2, dense_heads=1), 200),
        batch=2,
        heads=4,
        kv_heads=2,
        segments=4,
        soft_cap=1.5,
    ),
    "segments_multi_head": Case(
        kernel_cases._rule(Strided(16, 4, 4), 150, 170, query_offset=16),
        heads=4,
        kv_heads=4,
        segments=3,
    ),
}


@pytest.mark.parametrize("name", STRIPED)
@pytest.mark.representative("heads")
def test_band_and_gathered_stripes(name):
    call = kernel_cases.make(STRIPED[name])

    def in_parts(call):
        return strided.attend(strided.split(call), call, INTERPRETED)

    assert_agrees(call, kernel_cases.results(in_parts, call))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["heads", "segments"])
def test_stripes_of_the_heads_of_a_device(name):
    """Which heads these are is traced there; the stripes are gathered all the same."""
    first = 2
    call = kernel_cases.make(STRIPED[name])
    query, key, value = (
        jax.lax.slice_in_dim(x, first * x.shape[2] // 4, (first + 2) * x.shape[2] // 4, axis=2)
        for x in (call.query, call.key, call.value)
    )
    own = dataclasses.replace(
        call,
        query=query,
        key=key,
        value=value,
        block_mask=call.block_mask.take_heads(first, 2),
    )

    def in_parts(call, number):
        block_mask = STRIPED[name].block_mask().take_heads(number, 2)
        parts = strided.split(dataclasses.replace(call, block_mask=block_mask))
        assert isinstance(parts.phases, jax.Array)
        return strided.attend(parts, call, INTERPRETED)

    @jax.jit
    def run(number):
        return kernel_cases.results(lambda call: in_parts(call, number), own)

    assert_agrees(own, run(first))


def test_gathered_keys_are_met_by_queries_of_their_segments():
    """A segment has a tile of gathered keys in each head, whatever its phase."""
    call = kernel_cases.make(Case(kernel_cases._rule(Strided(16, 4, 4), 512), heads=4, kv_heads=2))
    ids = jnp.arange(512)[None] // 128
    parts = strided.split(call)
    gathered = parts.gathered(dataclasses.replace(call, segment_ids=(ids, ids)))
    listed = kernel_tables.key_lists(
        parts.stripes, Tiling.of(parts.stripes, 32, 32), Segments(*gathered.segment_ids)
    )
    assert listed.counts.shape == (1, 4, 16)
    assert listed.counts.max() == 1
    own = np.broadcast_to(np.arange(16) // 4, (1, 4, 16))
    is_listed = listed.counts > 0
    np.testing.assert_array_equal(listed.tiles[..., 0][is_listed], own[is_listed])


@pytest.mark.parametrize("has_segments", [False, True])
def test_stripes_are_gathered_where_that_leaves_fewer_tiles(has_segments):
    for length, calls in ((8192, 2), (256, 1)):
        block_mask = BlockMask.from_rule(Strided(64, 16, 2, left=4), length, is_causal=True)
        ids = jnp.zeros((1, length), jnp.int32)
        call = dataclasses.replace(
            kernel_cases.make(CASES["strided"]),
            block_mask=block_mask,
            segment_ids=(ids, ids) if has_segments else None,
            **dict.fromkeys(("query", "key", "value"), jnp.zeros((1, length, 2, 64), jnp.bfloat16)),
        )
        program = jax.make_jaxpr(lambda call=call: pallas_tpu.attend(call, INTERPRETED))()
        assert str(program).count("pallas_call[") == calls


@pytest.mark.parametrize(
    "change",
    [
        {"rule": Local(64)},
        {"rule": Strided(64, 2, 2, stripes="relative")},
        {"window_size": 200},
        {"query_offset": 32},
        {"query_offset": 64},
        {"is_traced": True},
    ],
    ids=str,
)
def test_stripes_do_not_apply(change):
    rule = change.get("rule", Strided(64, 2, 2))
    limits = {name: change[name] for name in ("window_size", "query_offset") if name in change}
    block_mask = BlockMask.from_rule(rule, 256, is_causal=True, **limits)
    if "is_traced" in change:
        block_mask = jax.tree.map(jnp.asarray, block_mask)
    call = kernel_cases.make(Case(lambda: block_mask, kv_heads=2))
    assert strided.split(call) is None


def _call(block_mask, dtype=jnp.bfloat16):
    lengths = (block_mask.query_length, block_mask.key_length, block_mask.key_length)
    arrays = [jnp.zeros((1, length, 1, 64), dtype) for length in lengths]
    fields = dict(zip(("query", "key", "value"), arrays, strict=True))
    return dataclasses.replace(
        kernel_cases.make(CASES["nothing"]), block_mask=block_mask, segment_ids=None, **fields
    )


def _tiles(*arguments):
    return tuning.choose(_call(*arguments)).tiles


def _random_mask(block, length):
    blocks = -(-length // block)
    return BlockMask.from_block_map(
        kernel_cases.random_map(1, blocks, blocks), length, length, block, block, is_causal=True
    )


def test_tiles_suit_the_mask():
    dense = BlockMask.from_rule(Dense(), 8192, is_causal=True)
    assert _tiles(dense) == (1024, 1024)
    assert _tiles(dense, jnp.float32) == (512, 512)
    # 32 bits are 32 pairs of blocks.
    assert _tiles(_random_mask(64, 8192)) in ((256, 512), (512, 256))
    assert _tiles(jax.tree.map(jnp.asarray, _random_mask(64, 8192))) in ((256, 512), (512, 256))
    assert np.prod(_tiles(_random_mask(16, 2048))) == 32 * 16 * 16
    query_tile, key_tile = _tiles(_random_mask(96, 2048))
    assert query_tile % 96 == key_tile % 96 == 0
    assert _tiles(BlockMask.from_rule(Dense(), 5, 300, is_causal=True)) == (16, 512)


@pytest.mark.parametrize(
    ("call", "platform", "reason"),
    [
        (lambda: _call(_random_mask(64, 256)), "cuda", "needs a TPU"),
        (lambda: _call(_random_mask(9, 256)), "tpu", "32 bits"),
        (lambda: _call(_random_mask(4, 256)), "tpu", "32 bits"),
        (
            lambda: _call(
                BlockMask.from_rule(Strided(64, 4, 1), 256, is_causal=True, query_offset=32)
            ),
            "tpu",
            "multiple of the blocks",
        ),
    ],
)
def test_refusals(call, platform, reason):
    assert reason in pallas_tpu.refusal(call(), Target(platform))


def test_numbers_of_head_and_tile_fit_into_a_word(monkeypatch):
    """Three heads take two bits, which leaves two of four: four tiles, and not five."""
    monkeypatch.setattr(flat, "TILE_BITS", 4)
    for tile_count, fits in ((4, True), (5, False)):
        length = 1024 * tile_count
        call = _call(BlockMask.from_rule(Dense(), length, is_causal=True))
        query = jnp.zeros((1, length, 3, 64), jnp.bfloat16)
        reason = pallas_tpu.refusal(dataclasses.replace(call, query=query), Target("tpu"))
        assert reason is None if fits else "number more than 4" in reason


def test_float64_is_refused():
    with jax.enable_x64(True):
        call = _call(_random_mask(64, 256), jnp.float64)
        assert "cast to float32" in pallas_tpu.refusal(call, INTERPRETED)
