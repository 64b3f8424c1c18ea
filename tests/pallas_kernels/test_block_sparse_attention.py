import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockMask,
    Dense,
    Local,
    Strided,
    block_sparse_attention,
    targets,
)
from pallas_kernels.block_sparse_attention import short_blocks, xla
from pallas_kernels.targets import Target

HEAD_DIM = 8
jitted = jax.jit(
    block_sparse_attention,
    static_argnames=("is_causal", "window_size", "implementation"),
)


def random_map(*shape):
    """A selection of blocks without any order, with rows that see nothing."""
    block_map = np.random.random(shape) < 0.4
    block_map[..., 1, :] = False
    return block_map


def arrays(batch, queries, keys, heads, kv_heads, dtype=np.float64):
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads)]
    return [
        jnp.asarray(np.random.standard_normal((batch, *shape, HEAD_DIM)), dtype) for shape in shapes
    ]


def segments(batch, queries, keys):
    ids = [np.random.randint(0, 3, (batch, n)) for n in (queries, keys)]
    return tuple(jnp.asarray(np.sort(array, axis=1), jnp.int32) for array in ids)


def with_gradients(inputs, block_mask, cotangents=None, **options):
    """Returns out, lse and the gradients of a random mix of both outputs."""
    attend = functools.partial(block_sparse_attention, return_lse=True, **options)
    (out, lse), pull = jax.vjp(lambda *x: attend(*x, block_mask), *inputs)
    if cotangents is None:
        rng = np.random.default_rng(1)
        cotangents = [rng.standard_normal(x.shape) for x in (out, lse)]
    cotangents = [jnp.asarray(x, y.dtype) for x, y in zip(cotangents, (out, lse), strict=True)]
    return out, lse, *pull(tuple(cotangents))


def assert_agree(results, expected, **tolerance):
    names = ("out", "lse", "d_query", "d_key", "d_value")
    for name, one, other in zip(names, results, expected, strict=True):
        assert not np.isnan(one).any(), name
        np.testing.assert_allclose(one, other, err_msg=name, **tolerance)


def compare(inputs, block_mask, tolerance=1e-12, segment_ids=None, **options):
    run = jax.jit(
        lambda inputs, block_mask, segment_ids, name: with_gradients(
            inputs,
            block_mask,
            implementation=name,
            segment_ids=segment_ids,
            **options,
        ),
        static_argnums=3,
    )
    results, expected = (
        run(inputs, block_mask, segment_ids, name) for name in ("xla", "reference")
    )
    assert_agree(results, expected, rtol=tolerance, atol=tolerance)
    return results


def causal_map(shape, queries, keys, size):
    return BlockMask.from_block_map(random_map(*shape), queries, keys, size, size, is_causal=True)


@pytest.fixture(autouse=True)
def tiles_of_two_blocks(monkeypatch):
    """Blocks of eight queries share small tiles, so that there are several where they do."""
    monkeypatch.setattr(short_blocks, "_TILE", 16)


@pytest.mark.representative("query_heads")
@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ((1,), {"is_causal": True}),
        ((2, 2), {"is_causal": False}),
        ((2, 4), {"is_causal": True, "window_size": 19, "query_offset": 5}),
    ],
    ids=["all_heads", "kv_heads", "query_heads"],
)
def test_single_queries(shape, limits):
    """Each with blocks of its own; they share tiles, of which the last is cut short."""
    with jax.enable_x64(True):
        block_map = jnp.asarray(random_map(*shape, 37, 7))
        block_mask = BlockMask.from_block_map(block_map, 37, 52, 1, 8, **limits)
        limits = {name: limits[name] for name in limits if name != "query_offset"}
        ids = segments(2, 37, 52)
        results = compare(arrays(2, 37, 52, 4, 2), block_mask, segment_ids=ids, **limits)
    assert np.isneginf(results[1]).any()


def test_static_blocks_keep_their_short_lists():
    """A table of all pairs of blocks would grow with the square of the length."""

    def joined(block_map):
        block_mask = BlockMask.from_block_map(block_map, 40, 40, 8, 8, is_causal=True)
        return short_blocks.joined(block_mask)

    block_map = random_map(1, 5, 5)
    static, of_static = joined(block_map)
    traced, of_traced = jax.eval_shape(joined, block_map)
    assert (static.query_block_size, of_static) == (8, None)
    assert (traced.query_block_size, of_traced.shape) == (16, (1, 3, 5, 2))


def test_one_pattern_ragged_with_segments():
    with jax.enable_x64(True):
        results = compare(
            arrays(2, 37, 52, 4, 2),
            causal_map((1, 5, 7), 37, 52, 8),
            is_causal=True,
            segment_ids=segments(2, 37, 52),
        )
    assert np.isneginf(results[1]).any()


def test_pattern_per_kv_head_and_batch_with_soft_cap():
    with jax.enable_x64(True):
        block_map = jnp.asarray(random_map(2, 2, 5, 7))
        block_mask = BlockMask.from_block_map(block_map, 37, 52, 8, 8, is_causal=False)
        compare(arrays(2, 37, 52, 4, 2), block_mask, is_causal=False, logits_soft_cap=1.5)


@pytest.mark.parametrize("scores_in_cache", [1, 2**15], ids=["one_by_one", "side_by_side"])
def test_pattern_per_query_head_of_groups(scores_in_cache, monkeypatch):
    """Small tiles of several programs are computed side by side, large ones one by one."""
    monkeypatch.setattr(xla, "_SCORES_IN_CACHE", scores_in_cache)
    with jax.enable_x64(True):
        results = compare(
            arrays(2, 40, 40, 6, 2),
            causal_map((6, 5, 5), 40, 40, 8),
            is_causal=True,
            window_size=19,
            scale=0.7,
        )
    assert np.isneginf(results[1]).any()


@pytest.mark.parametrize(
    ("rule", "tiles", "queries"),
    [
        (Strided(4, 3, num_heads=4, left=2, dense_heads=1), (16, 8), 45),
        (Local(16, left=2), (8, 16), 30),
        (Dense(), (16, 16), 45),
    ],
    ids=["strided", "local", "dense"],
)
def test_rules_in_other_tiles(rule, tiles, queries):
    with jax.enable_x64(True):
        block_mask = BlockMask.from_rule(rule, queries, 45, *tiles, is_causal=True)
        compare(arrays(1, queries, 45, 4, 2), block_mask, is_causal=True)


def test_traced_offset_shifts_every_limit():
    rule = Strided(8, 3, num_heads=2, left=1)

    @functools.partial(jax.jit, static_argnums=2)
    def run(inputs, offset, name):
        block_mask = BlockMask.from_rule(rule, 16, 48, 8, 8, is_causal=True, query_offset=offset)
        return with_gradients(inputs, block_mask, implementation=name, is_causal=True)

    with jax.enable_x64(True):
        query, key, value = arrays(1, 48, 48, 2, 2)
        block_mask = BlockMask.from_rule(rule, 48, is_causal=True)
        whole = jitted(query, key, value, block_mask, is_causal=True)
        for offset in (0, 13, 32):
            chunk = (query[:, offset : offset + 16], key, value)
            results = run(chunk, offset, "xla")
            assert_agree(results, run(chunk, offset, "reference"), atol=1e-12)
            np.testing.assert_allclose(results[0], whole[:, offset : offset + 16], atol=1e-12)
    assert run._cache_size() == 2


def test_offset_of_the_call_overrides_that_of_the_mask():
    inputs = arrays(1, 16, 32, 2, 2, np.float32)
    everywhere = BlockMask.from_block_map(np.ones((1, 2, 4), bool), 16, 32, 8, 8, is_causal=False)
    moved = BlockMask.from_rule(
        Dense(), 16, 32, 8, 8, is_causal=True, query_offset=3, window_size=9
    )
    options = {"is_causal": True, "window_size": 9}
    np.testing.assert_array_equal(
        jitted(*inputs, everywhere, query_offset=3, **options),
        jitted(*inputs, moved, **options),
    )


@pytest.mark.parametrize(
    ("limits", "offset"),
    [
        ({"is_causal": True}, 17),
        ({"is_causal": False, "window_size": 9}, 15),
        ({"is_causal": False, "window_size": 9}, 17),
    ],
)
def test_an_offset_that_shows_tiles_not_listed(limits, offset):
    block_mask = BlockMask.from_rule(Dense(), 16, 32, 8, 8, **limits)
    inputs = arrays(1, 16, 32, 2, 2, np.float32)
    with pytest.raises(ValueError, match=rf"query_offset={offset} shows .* query_offset=16,"):
        block_sparse_attention(*inputs, block_mask, query_offset=offset, **limits)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_dtypes(dtype):
    inputs = arrays(1, 40, 40, 2, 1, dtype)
    block_mask = BlockMask.from_rule(Local(8, left=2), 40, is_causal=True)
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    results = compare(inputs, block_mask, is_causal=True, tolerance=tolerance, window_size=12)
    assert [x.dtype for x in results] == [dtype, jnp.float32, dtype, dtype, dtype]


def test_mask_that_lists_nothing():
    nothing = np.zeros((1, 2, 2), bool)
    block_mask = BlockMask.from_block_map(nothing, 16, 16, 8, 8, is_causal=True)
    run = jax.jit(lambda inputs: with_gradients(inputs, block_mask, is_causal=True))
    out, lse, *grads = run(arrays(1, 16, 16, 2, 2, np.float32))
    assert np.isneginf(lse).all()
    for array in (out, *grads):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize(
    ("implementation", "size", "block_size"),
    [("xla", 1e4, 8), ("xla", 1e37, 5), ("reference", 1e37, 5), ("pallas_tpu", 1e37, 8)],
)
def test_the_future_changes_nothing_before_it(implementation, size, block_size):
    """Hidden keys are multiplied by weights of 0: whatever is finite does no harm."""
    length, present = 32, 19
    rule = Strided(block_size, 2, num_heads=2)
    block_mask = BlockMask.from_rule(rule, length, is_causal=True)
    inputs = arrays(1, length, length, 2, 2, np.float32)
    cotangents = [np.random.standard_normal(x) for x in ((1, 32, 2, 8), (1, 32, 2))]
    for cotangent in cotangents:
        cotangent[:, present:] = 0
    options = {"is_causal": True, "implementation": implementation}
    run = jax.jit(lambda inputs: with_gradients(inputs, block_mask, cotangents, **options))
    # Finite scores among the perturbed themselves, whatever their size.
    future = [x.at[:, present:].set(s) for x, s in zip(inputs, (0, size, size), strict=True)]
    with targets.use(Target("tpu", interpret=True)):
        results, changed = run(inputs), run(future)
    for before, after in zip(results, changed, strict=True):
        np.testing.assert_array_equal(before[:, :present], after[:, :present])


def test_segments_do_not_see_each_other():
    length, first = 32, 13
    ids = jnp.asarray(np.arange(length)[None] >= first, jnp.int32)
    block_mask = BlockMask.from_rule(Local(8, left=2, right=2), length, is_causal=False)
    inputs = arrays(1, length, length, 2, 1, np.float32)
    run = jax.jit(
        lambda inputs: with_gradients(inputs, block_mask, is_causal=False, segment_ids=(ids, ids))
    )
    other = [x.at[:, first:].multiply(100.0) for x in inputs]
    for before, after in zip(run(inputs), run(other), strict=True):
        np.testing.assert_array_equal(before[:, :first], after[:, :first])


def test_masks_of_one_shape_share_a_compilation():
    inputs = arrays(1, 32, 32, 2, 2, np.float32)
    run = jax.jit(
        lambda inputs, block_mask: block_sparse_attention(*inputs, block_mask, is_causal=True)
    )
    for _ in range(3):
        block_map = random_map(2, 4, 4)
        block_map[..., 3, :] = block_map[..., 0] = True
        run(
            inputs,
            BlockMask.from_block_map(block_map, 32, 32, 8, 8, is_causal=True),
        )
    assert run._cache_size() == 1


def test_vmap_over_arrays_and_masks_and_remat():
    maps = jnp.asarray(np.stack([random_map(2, 4, 4) for _ in range(3)]))
    stacked = [
        jnp.stack(x)
        for x in zip(*(arrays(1, 30, 30, 2, 2, np.float32) for _ in range(3)), strict=True)
    ]

    @jax.checkpoint
    def attend(block_map, *inputs):
        block_mask = BlockMask.from_block_map(block_map, 30, 30, 8, 8, is_causal=True)
        return block_sparse_attention(*inputs, block_mask, is_causal=True)

    def loss(block_map, *inputs):
        return jnp.sum(jnp.square(attend(block_map, *inputs)))

    gradient = jax.grad(loss, (1, 2, 3))
    together = jax.jit(jax.vmap(gradient))(maps, *stacked)
    one_by_one = jax.jit(lambda *x: jax.lax.map(lambda y: gradient(*y), x))
    for one, other in zip(together, one_by_one(maps, *stacked), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "block_mask",
    [
        lambda: causal_map((4, 5, 5), 40, 40, 8),
        # The rule decides inside tiles, for the heads that a device has.
        lambda: BlockMask.from_rule(Strided(5, 3, num_heads=4), 40, 40, 8, 8, is_causal=True),
    ],
    ids=["selected", "rule"],
)
def test_shard_map_over_batch_and_heads(block_mask):
    inputs = arrays(2, 40, 40, 4, 2, np.float32)
    block_mask = block_mask()
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=automatic)
    # Tables follow the heads, and all devices share the offset.
    tables = dataclasses.replace(
        jax.tree.map(lambda _: jax.P("tensor"), block_mask), query_offset=jax.P()
    )
    spec = jax.P("data", None, "tensor")

    def attend(block_mask, *inputs):
        return block_sparse_attention(*inputs, block_mask, is_causal=True)

    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(tables, spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )

    def gradients(attend):
        def loss(inputs):
            return jnp.sum(jnp.sin(attend(block_mask, *inputs)))

        return jax.jit(jax.value_and_grad(loss))

    (one, one_grads), (other, other_grads) = (
        gradients(function)(tuple(inputs)) for function in (attend, sharded)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for a, b in zip(one_grads, other_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [Dense(), Local(256), Strided(64, 16, num_heads=2, left=4)], ids=str
)
def test_memory_grows_with_tokens(rule):
    def temporary(length):
        block_mask = BlockMask.from_rule(rule, length, is_causal=True)
        array = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
        run = jax.jit(
            lambda q, k, v, block_mask: with_gradients(
                (q, k, v),
                block_mask,
                (jnp.ones(q.shape), jnp.ones(q.shape[:3])),
                is_causal=True,
            )
        )
        compiled = run.lower(array, array, array, block_mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    assert long < 16384**2
    assert long < 4.5 * short


def test_no_product_has_a_transposed_left_factor():
    """XLA's CPU backend takes four times as long where the left one is read by columns."""
    block_mask = BlockMask.from_rule(Dense(), 256, is_causal=True)
    run = functools.partial(with_gradients, is_causal=True, implementation="xla")
    program = str(jax.make_jaxpr(run)(arrays(1, 256, 256, 2, 1, np.float32), block_mask))
    axes = re.findall(r"dimension_numbers=\(\(\[(\d)\], \[\d\]\), \(\[0\], \[0\]\)\)", program)
    products = 2 + 5
    assert axes == ["2"] * products * 2  # for a CPU, and for what else there is


def test_several_implementations_in_order():
    inputs = arrays(1, 16, 16, 2, 2, np.float32)
    block_mask = BlockMask.from_rule(Local(8), 16, is_causal=True)
    attend = functools.partial(jitted, *inputs, block_mask, is_causal=True)
    for several, first in ((("reference", "xla"), "reference"), (None, "xla")):
        np.testing.assert_array_equal(attend(implementation=several), attend(implementation=first))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(4))
def test_torch_agrees(seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    queries, keys = (int(n) for n in rng.integers(20, 60, 2))
    rule = Strided(8, int(rng.integers(1, 5)), num_heads=4, left=int(rng.integers(1, 4)))
    block_mask = BlockMask.from_rule(rule, queries, keys, is_causal=True)
    inputs = arrays(2, queries, keys, 4, 2, np.float32)
    results = with_gradients(inputs, block_mask, is_causal=True)

    theirs = [torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in inputs]
    mask = torch.tensor(np.asarray(block_mask.to_dense()))
    visible = mask.any(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(
        *theirs, attn_mask=mask | ~visible, enable_gqa=True
    )
    out = torch.where(visible, out, 0.0)
    d_out = np.random.default_rng(1).standard_normal(results[0].shape)
    d_out = torch.tensor(d_out, dtype=torch.float32).transpose(1, 2)
    out.backward(d_out)
    ours = jax.vjp(lambda *x: block_sparse_attention(*x, block_mask, is_causal=True), *inputs)[1](
        jnp.asarray(d_out.transpose(1, 2).numpy())
    )
    for one, other in zip((results[0], *ours), (out, *(x.grad for x in theirs)), strict=True):
        np.testing.assert_allclose(one, other.detach().transpose(1, 2).numpy(), atol=2e-5)
