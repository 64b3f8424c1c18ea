"""Intersection, union and transpose of masks, token by token."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Dense, Local, Strided, block_sparse_attention

# Queries, keys and tiles: 4 x 6 blocks, ragged. The first query has position 16.
LENGTHS = (30, 46, 8, 8)


def random_map(seed, *shape):
    return np.random.default_rng(seed).random((*shape, 4, 6)) < 0.5


def selected(seed, *shape, **limits):
    limits = {"is_causal": False} | limits
    return BlockMask.from_block_map(random_map(seed, *shape), *LENGTHS, **limits)


def local(**limits):
    limits = {"is_causal": False} | limits
    return BlockMask.from_rule(Local(8, left=2, right=2), *LENGTHS, **limits)


def check_exact(mask, expected):
    """Compares tokens and both orientations, and that FULL tiles are full."""
    np.testing.assert_array_equal(mask.to_dense(), expected)
    np.testing.assert_array_equal(mask.block_map(), mask.transpose().block_map().swapaxes(-1, -2))
    np.testing.assert_array_equal(mask.full_map(), mask.transpose().full_map().swapaxes(-1, -2))
    full = np.repeat(np.repeat(mask.full_map(), 8, -2), 8, -1)[..., :30, :46]
    assert (full <= expected).all()


INTERSECTIONS = {
    "heads": (selected(0, 3), selected(1, 3)),
    "one_head_and_batch": (selected(0, 1), selected(1, 2, 3)),
    "causal_and_window": (selected(0, 1, is_causal=True), local(window_size=7)),
    "windows": (selected(0, 2, window_size=20), selected(1, 2, window_size=11, is_causal=True)),
    "opposite": (selected(0, 2, is_causal=True), selected(1, 2, is_causal=True, window_size=9)),
}


@pytest.mark.parametrize(("one", "other"), INTERSECTIONS.values(), ids=INTERSECTIONS)
def test_and(one, other):
    both = one & other
    check_exact(both, one.to_dense() & other.to_dense())
    seen = np.pad(both.to_dense(), [(0, 0)] * (both.kv_counts.ndim - 1) + [(0, 2), (0, 2)])
    some = seen.reshape(*seen.shape[:-2], 4, 8, 6, 8).any((-3, -1))
    np.testing.assert_array_equal(both.block_map(), some)


def test_and_of_causal_prefixes():
    masks = [selected(seed, 2, is_causal=True, prefix_length=n) for seed, n in ((0, 30), (1, 17))]
    masks.append(selected(2, 2))
    dense = [mask.to_dense() for mask in masks]
    for a, b in ((0, 1), (1, 0), (0, 2), (2, 1)):
        np.testing.assert_array_equal((masks[a] & masks[b]).to_dense(), dense[a] & dense[b])


@pytest.mark.parametrize(
    "limits",
    [{}, {"is_causal": True}, {"window_size": 9}, {"is_causal": True, "query_offset": 8}],
    ids=str,
)
def test_or(limits):
    for one, other in (
        (selected(0, 3, **limits), selected(1, 3, **limits)),
        (selected(0, 2, 3, **limits), local(**limits)),
    ):
        check_exact(one | other, one.to_dense() | other.to_dense())


@pytest.mark.parametrize("combine", [operator.and_, operator.or_])
def test_traced_selection_with_a_static_rule(combine):
    block_map = random_map(0, 2, 3)
    rule = local(is_causal=True)

    @jax.jit
    def build(block_map):
        learned = BlockMask.from_block_map(block_map, *LENGTHS, is_causal=True, capacity=2)
        return combine(learned, rule), learned.overflow

    mask, overflow = build(block_map)
    kept = block_map & (np.arange(6) * 8 <= np.arange(4)[:, None] * 8 + 16 + 7)
    kept &= np.cumsum(kept, -1) <= 2
    learned = BlockMask.from_block_map(kept, *LENGTHS, is_causal=True)
    check_exact(mask, combine(learned.to_dense(), rule.to_dense()))
    np.testing.assert_array_equal(mask.overflow, overflow)
    assert overflow.any()


@pytest.mark.parametrize("combine", [operator.and_, operator.or_])
def test_equal_rules_inside_tiles(combine):
    rule = Strided(4, 3, num_heads=2)
    parts = [
        BlockMask.from_rule(rule, 40, 40, 16, 16, is_causal=True),
        BlockMask.from_rule(rule, 40, 40, 16, 16, is_causal=True, prefix_length=0),
    ]
    assert parts[0].inner_rule is not None
    np.testing.assert_array_equal(combine(*parts).to_dense(), parts[0].to_dense())
    whole = BlockMask.from_block_map(
        random_map(0, 2)[:, :3, :3], 40, 40, 16, 16, is_causal=True, window_size=20
    )
    np.testing.assert_array_equal(
        (whole & parts[0]).to_dense(), whole.to_dense() & parts[0].to_dense()
    )


@pytest.mark.parametrize("limits", [{}, {"is_causal": True}, {"is_causal": True, "window_size": 9}])
@pytest.mark.parametrize("offset", [None, 4, -7])
def test_transpose(limits, offset):
    mask = selected(0, 2, 3, query_offset=offset, **limits)
    np.testing.assert_array_equal(mask.transpose().to_dense(), mask.to_dense().swapaxes(-1, -2))
    np.testing.assert_array_equal(mask.transpose().transpose().to_dense(), mask.to_dense())
    assert mask.transpose().density() == pytest.approx(float(mask.density()))


def test_a_transpose_refuses_offsets_that_show_what_is_not_listed():
    mask = BlockMask.from_rule(Dense(), 30, 46, 8, 8, is_causal=True).transpose()
    assert mask.tightened(False, None, -16).query_offset == -16
    with pytest.raises(ValueError, match="query_offset=-17 shows tiles"):
        mask.tightened(False, None, -17)


@pytest.mark.parametrize("make", ["prefix", "transpose", "diagonal"])
def test_attention_keeps_limits_of_the_mask_alone(make):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, n, 2, 8)), jnp.float32) for n in (30, 46, 46)]
    flipped = BlockMask.from_rule(Dense(), 46, 30, 8, 8, is_causal=True).transpose()
    masks = {
        "prefix": selected(0, 2, is_causal=True, prefix_length=19, query_offset=0),
        "transpose": flipped,
        "diagonal": flipped & selected(0, 1, is_causal=True),
    }
    mask = masks[make]

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays, name):
        attend = functools.partial(
            block_sparse_attention, is_causal=mask.is_causal, implementation=name
        )
        out, pull = jax.vjp(lambda *arrays: attend(*arrays, mask), *arrays)
        return (out, *pull(jnp.cos(out)))

    for one, other in zip(run(arrays, "xla"), run(arrays, "reference"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def prefixed():
    return selected(0, 1, is_causal=True, prefix_length=8)


INNER = BlockMask.from_rule(Strided(4, 3, num_heads=2), *LENGTHS, is_causal=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: selected(0, 1) | selected(0, 1, is_causal=True),
            "is_causal=False on the left, is_causal=True on the right; .* one set of limits",
        ),
        (
            lambda: selected(0, 1, window_size=4) | selected(0, 1, window_size=5),
            "window_size=4 on the left, window_size=5 on the right",
        ),
        (
            lambda: selected(0, 1) & BlockMask.from_rule(Dense(), 30, 46, 8, 9, is_causal=False),
            "key_block_size=8 on the left, key_block_size=9 on the right; .* build both",
        ),
        (
            lambda: selected(0, 1) & BlockMask.from_rule(Dense(), 30, 45, 8, 8, is_causal=False),
            "key_length=46 on the left, key_length=45 on the right",
        ),
        (
            lambda: selected(0, 1) & selected(0, 1, query_offset=3),
            "query_offset=16 on the left, query_offset=3 on the right",
        ),
        (
            lambda: selected(0, 2) & selected(0, 3),
            r"heads are \(2,\) on the left, \(3,\) on the right: .* equal or 1",
        ),
        (
            lambda: selected(0, 2) | INNER,
            "inside tiles decides None on the left, Strided.* leave out the tile sizes",
        ),
        (lambda: selected(0, 2, 4) & INNER, "heads are"),
        (
            lambda: BlockMask.from_rule(Local(4), *LENGTHS, is_causal=False) & selected(0, 3),
            "no one rule does for 3 pattern heads",
        ),
        (lambda: INNER.transpose(), "decides inside tiles, and has no transpose"),
        (lambda: prefixed().transpose(), "prefix_length=8 has no transpose"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("combine", [operator.and_, operator.or_])
def test_combines_with_masks_alone(combine, untyped):
    for other in (None, np.ones((1, 4, 6), bool)):
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(selected(0, 1), other)


def test_traced_offsets_must_be_one_array():
    build = functools.partial(BlockMask.from_rule, Dense(), *LENGTHS, is_causal=True)

    @jax.jit
    def same(offset):
        return build(query_offset=offset) & build(query_offset=offset)

    @jax.jit
    def different(offset):
        return build(query_offset=offset) & build(query_offset=offset + 0)

    np.testing.assert_array_equal(same(jnp.int32(3)).to_dense(), build(query_offset=3).to_dense())
    with pytest.raises(ValueError, match="if traced, one int32 array"):
        different(jnp.int32(3))
