import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Dense, Local, Strided, tiles
from pallas_kernels.block_mask import FULL, PARTIAL

RULES = {
    "dense": Dense(),
    "local": Local(8, left=2),
    "local_ahead": Local(6, left=1, right=3),
    "strided": Strided(8, 3, num_heads=4, left=2, offset=1),
    "strided_groups": Strided(4, 5, 4, num_kv_heads=2, dense_heads=1, phase_by="kv_head"),
    "relative": Strided(8, 2, num_heads=4, left=2, stripes="relative"),
    "homo": Strided(16, 2, num_heads=4, homo_head=True, step=0),
}
# Queries, keys, query tile, key tile, offset, causal, window, prefix.
PROBLEMS = [
    (50, 50, 8, 8, None, True, None, 0),
    (48, 48, 16, 8, None, False, None, 0),
    (41, 70, 16, 12, None, True, 9, 0),
    (40, 64, 8, 16, -13, False, 11, 0),
    (33, 47, 5, 7, 20, True, None, 0),
    (50, 50, 8, 8, None, True, None, 21),
    (41, 43, 16, 12, -5, True, 9, 24),
    (33, 47, 5, 7, 0, True, 40, 99),
]


def tokens(rule, queries, keys, offset, is_causal, window, prefix=0):
    """The definition, token by token: [Hp, T, S]."""
    position, key = np.arange(queries)[:, None] + offset, np.arange(keys)
    size = rule.block_size or 1
    head = np.arange(rule.pattern_heads)[:, None, None]
    mask = rule.visible(head, position // size, key // size)
    mask = np.broadcast_to(mask, (rule.pattern_heads, queries, keys))
    mask = mask & (((key <= position) | (key < prefix)) if is_causal else True)
    return mask & ((abs(position - key) < window) if window else True)


def by_tile(mask, query_tile, key_tile, reduce):
    """Reduces [Hp, T, S] over tiles; ragged ones are padded with what is masked."""
    rows, columns = -mask.shape[1] % query_tile, -mask.shape[2] % key_tile
    mask = np.pad(mask, ((0, 0), (0, rows), (0, columns)))
    heads, queries, keys = mask.shape
    tiles = mask.reshape(heads, queries // query_tile, query_tile, -1, key_tile)
    return reduce(tiles, axis=(2, 4))


def listed(block_mask, table):
    counts = np.asarray(getattr(block_mask, f"{table}_counts"))
    indices = np.asarray(getattr(block_mask, f"{table}_indices"))
    return np.arange(indices.shape[-1]) < counts[..., None], indices


def kinds_map(block_mask, table, length):
    """Spreads the lists of one orientation over all blocks; 0 where not listed."""
    is_listed, indices = listed(block_mask, table)
    kinds = np.asarray(getattr(block_mask, f"{table}_kinds"))
    spread = np.zeros((*indices.shape[:-1], length), int)
    for place in zip(*np.nonzero(is_listed), strict=True):
        spread[(*place[:-1], indices[place])] = kinds[place]
    return spread


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_says_what_its_tokens_say(rule, problem):
    queries, keys, query_tile, key_tile, offset, is_causal, window, prefix = problem
    block_mask = BlockMask.from_rule(
        rule,
        *(queries, keys, query_tile, key_tile),
        is_causal=is_causal,
        window_size=window,
        prefix_length=prefix,
        query_offset=offset,
    )
    offset = keys - queries if offset is None else offset
    expected = tokens(rule, queries, keys, offset, is_causal, window, prefix)
    np.testing.assert_array_equal(block_mask.to_dense(), expected)
    some = by_tile(expected, query_tile, key_tile, np.any)
    every = by_tile(expected, query_tile, key_tile, np.all)
    kinds = np.where(every, FULL, some * PARTIAL)
    geometry = block_mask.geometry
    np.testing.assert_array_equal(kinds_map(block_mask, "kv", geometry.key_blocks), kinds)
    np.testing.assert_array_equal(
        kinds_map(block_mask, "q", geometry.query_blocks), kinds.swapaxes(1, 2)
    )


@pytest.mark.parametrize("rule", [RULES["strided"], RULES["strided_groups"]])
def test_traced_offset_agrees_with_static(rule):
    build = jax.jit(
        lambda offset: BlockMask.from_rule(rule, 24, 64, 8, 16, is_causal=True, query_offset=offset)
    )
    for offset in (-5, 0, 16, 37):
        static = BlockMask.from_rule(rule, 24, 64, 8, 16, is_causal=True, query_offset=offset)
        traced = build(offset)
        np.testing.assert_array_equal(traced.to_dense(), static.to_dense())
        np.testing.assert_array_equal(traced.kv_counts, static.kv_counts)
        np.testing.assert_array_equal(traced.q_counts, static.q_counts)
        assert traced.density() == pytest.approx(static.density())
    assert build._cache_size() == 1


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_block_map_traced_agrees_with_static(shape):
    block_map = np.random.default_rng(0).random(shape) < 0.4
    block_map[..., 1, :] = False

    def build(block_map):
        return BlockMask.from_block_map(block_map, 30, 45, 8, 8, is_causal=True)

    static, traced = build(block_map), jax.jit(build)(block_map)
    assert static.kv_indices.shape[-1] == static.kv_counts.max()
    assert traced.kv_indices.shape[-1] == shape[-1]
    np.testing.assert_array_equal(static.to_dense(), traced.to_dense())
    position, key = np.arange(30)[:, None] + 15, np.arange(45)
    expected = np.repeat(np.repeat(block_map, 8, -2), 8, -1)[..., :30, :45]
    np.testing.assert_array_equal(static.to_dense(), expected & (key <= position))
    for table in ("kv", "q"):
        for one, other in zip(listed(static, table), listed(traced, table), strict=True):
            np.testing.assert_array_equal(one, other[..., : one.shape[-1]])


def test_past_the_count_the_last_entry_repeats():
    rule = Strided(4, 3, num_heads=2)
    block_mask = BlockMask.from_rule(rule, 40, is_causal=True)
    for table in ("kv", "q"):
        is_listed, indices = listed(block_mask, table)
        last = np.where(is_listed, indices, -1).max(-1, keepdims=True)
        np.testing.assert_array_equal(np.where(is_listed, last, indices), last + 0 * indices)
        assert (np.diff(indices, axis=-1) >= 0).all()


@pytest.mark.parametrize(
    ("rule", "tile"),
    [
        (Dense(), (256, 256)),
        (Local(1024), (128, 128)),
        (Local(200), (100, 100)),
        (Local(129), (129, 129)),
        (Strided(64, 2, num_heads=2), (64, 64)),
    ],
)
def test_default_tiles(rule, tile):
    block_mask = BlockMask.from_rule(rule, 2000, is_causal=True)
    assert (block_mask.query_block_size, block_mask.key_block_size) == tile
    # Tiles that divide the rule's blocks leave nothing to decide inside.
    assert block_mask.inner_rule is None


@pytest.mark.parametrize(
    ("queries", "keys", "tile"),
    [
        (1, 3, (1, 3)),
        (127, 300, (127, 128)),
        (512, 512, (128, 128)),
        (1023, 1024, (128, 256)),
        (2047, 2048, (256, 256)),
        (2048, 10**6, (512, 256)),
    ],
)
def test_dense_tiles_are_small_where_the_sequence_is_short(queries, keys, tile):
    block_mask = BlockMask.from_rule(Dense(), queries, keys, is_causal=True)
    assert (block_mask.query_block_size, block_mask.key_block_size) == tile


@pytest.mark.parametrize("rule", ["strided", "strided_groups"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_some_heads_show_what_they_showed(rule, problem):
    queries, keys, *sizes, offset, is_causal, window, prefix = problem
    block_mask = BlockMask.from_rule(
        *(RULES[rule], queries, keys, *sizes),
        is_causal=is_causal,
        window_size=window,
        prefix_length=prefix,
        query_offset=offset,
    )
    everything = block_mask.to_dense()
    heads = len(everything)
    traced = jax.jit(lambda first: block_mask.take_heads(first, 2).to_dense())
    for first in range(heads - 1):
        taken = block_mask.take_heads(first, 2)
        assert isinstance(taken.kv_counts, np.ndarray)
        expected = everything[first : first + 2]
        np.testing.assert_array_equal(taken.to_dense(), expected)
        np.testing.assert_array_equal(traced(first), expected)


def test_density_is_relative_to_dense_with_the_same_limits():
    dense = BlockMask.from_rule(Dense(), 100, 100, 8, 8, is_causal=True, window_size=20)
    assert dense.density() == 1
    own_block = BlockMask.from_rule(Local(10), 100, is_causal=True)
    assert own_block.density() == pytest.approx(10 / 55)
    nothing = BlockMask.from_rule(Dense(), 80, 80, 8, 8, is_causal=True, query_offset=-100)
    assert nothing.density() == 0


def random_mask(rng):
    """Of a selection or of a rule, under limits of every kind."""
    queries, keys = (int(n) for n in rng.integers(10, 60, 2))
    limits = {"is_causal": bool(rng.random() < 0.5)}
    if rng.random() < 0.5:
        limits["window_size"] = int(rng.integers(1, 60))
    if limits["is_causal"] and rng.random() < 0.5:
        limits["prefix_length"] = int(rng.integers(0, 40))
    if rng.random() < 0.3:
        rule = list(RULES.values())[rng.integers(len(RULES))]
        return BlockMask.from_rule(rule, keys, **limits)
    sizes = rng.integers(3, 20, 2).tolist()
    offset = int(rng.integers(-30, 60))
    blocks = [-(-n // size) for n, size in zip((queries, keys), sizes, strict=True)]
    block_map = rng.random((2, 3, *blocks)) < rng.random()
    return BlockMask.from_block_map(block_map, queries, keys, *sizes, query_offset=offset, **limits)


def tightened(mask, rng):
    """The same mask under limits of its own, at an offset that may show what is not listed."""
    windows = [mask.window_size or 60, int(rng.integers(1, 60))]
    offset = jnp.int32(rng.integers(-30, 60)) if rng.random() < 0.5 else None
    is_causal = mask.is_causal or bool(rng.random() < 0.5)
    return mask.tightened(is_causal, min(windows), offset)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.representative("?")
def test_density_counts_tiles_that_the_limits_leave(seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng)
    for one in (mask, tightened(mask, rng), tightened(tightened(mask, rng), rng)):
        size = (one.query_block_size, one.key_block_size)
        position = np.arange(one.query_length)[:, None] + np.asarray(one.query_offset)
        pairs = one.geometry.pairs(position, np.arange(one.key_length))
        attended = np.asarray(one.to_dense()).reshape(-1, *pairs.shape)
        attended, dense = (by_tile(x, *size, np.any) for x in (attended, pairs[None]))
        assert 0 <= one.density() <= 1
        assert one.density() == pytest.approx(attended.sum() / max(1, len(attended) * dense.sum()))


def test_masks_of_one_shape_share_a_compilation():
    count = jax.jit(lambda block_mask: block_mask.kv_counts.sum())
    for seed in range(2):
        block_map = np.random.default_rng(seed).random((1, 4, 4)) < 0.5
        block_map[:, 0], block_map[:, :, 0] = True, True
        count(BlockMask.from_block_map(block_map, 32, 32, 8, 8, is_causal=False))
    assert count._cache_size() == 1


def test_no_table_grows_with_tokens():
    """Tables of 128k tokens are made in tile steps, not in token steps."""
    block_mask = BlockMask.from_rule(
        Strided(64, 16, num_heads=2, left=16), 2**17, 2**17, 512, 512, is_causal=True
    )
    assert max(leaf.size for leaf in jax.tree.leaves(block_mask)) <= 2 * 256**2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Local(0), "block_size=0 must be at least 1"),
        (lambda: Strided(8, 0, 4), "stride=0 must be at least 1"),
        (
            lambda: Strided(8, 2, 4, num_kv_heads=3),
            "num_kv_heads=3 must divide num_heads=4",
        ),
        (lambda: Strided(8, 2, 4, step=-1), "step=-1 must not be negative"),
        (
            lambda: Strided(8, 2, 4, dense_heads=5),
            "dense_heads=5 must be from 0 to the 4",
        ),
        (
            lambda: Strided(8, 2, 4, dense_heads=1, homo_head=True),
            "set homo_head=False",
        ),
        (lambda: Local(8.0), r"block_size=8\.0 must be an integer"),
        (lambda: Local(8, left=None), "left=None must be an integer"),
        (lambda: Strided(8, 2, 4, num_kv_heads=0), "num_kv_heads=0 must be at least 1"),
        (lambda: Strided(8, 2, 4, offset=0.5), r"offset=0\.5 must be an integer"),
        (lambda: BlockMask.from_rule("dense", 8, is_causal=True), r"rule is 'dense': pass Dense"),
        (lambda: BlockMask.from_rule(Dense, 8, is_causal=True), "rule is <class .*: pass Dense"),
        (lambda: BlockMask.from_rule(Dense(), 0, is_causal=True), "query_length=0"),
        (
            lambda: BlockMask.from_rule(Dense(), 8.0, is_causal=True),
            r"query_length=8\.0 must be an integer",
        ),
        (
            lambda: BlockMask.from_rule(Dense(), 8, is_causal=None),
            "is_causal=None must be True or False",
        ),
        (
            lambda: BlockMask.from_rule(Dense(), 8, is_causal=True, window_size=2**40),
            "window_size=1099511627776 must be at most",
        ),
        (
            lambda: BlockMask.from_rule(Dense(), 8, is_causal=True, query_offset=2**30),
            "query_offset=1073741824 must be from -536870912 to 536870912",
        ),
        (
            lambda: tiles.as_scalar(np.zeros(2, np.int32)),
            r"query_offset is int32\[2\]: pass one integer",
        ),
        (
            lambda: tiles.as_scalar(jnp.float32(1.5)),
            r"query_offset is float32\[\]: pass one integer",
        ),
        (
            lambda: BlockMask.from_rule(Dense(), 8, 8, 0, is_causal=True),
            "query_block_size=0 must be at least 1",
        ),
        (
            lambda: BlockMask.from_rule(Dense(), 8, is_causal=True, window_size=0),
            "window_size=0 must be at least 1",
        ),
        (
            lambda: BlockMask.from_rule(Dense(), 8, is_causal=True, prefix_length=-1),
            "prefix_length=-1 must not be negative",
        ),
        (
            lambda: BlockMask.from_rule(Dense(), 8, is_causal=False, prefix_length=4),
            "prefix_length=4 lifts causality.*pass is_causal=True",
        ),
        (
            lambda: BlockMask.from_block_map(
                np.ones((1, 2, 3), bool), 16, 16, 8, 8, is_causal=True
            ),
            r"block_map has shape \(1, 2, 3\).*pass \[heads, 2, 2\]",
        ),
        (
            lambda: BlockMask.from_block_map(np.ones((1, 2, 2)), 16, 16, 8, 8, is_causal=True),
            "block_map has dtype float64: pass booleans",
        ),
        (
            lambda: BlockMask.from_block_map([[[True]]], 8, 8, 8, 8, is_causal=True),
            "block_map is list: pass an array",
        ),
        (
            lambda: BlockMask.from_block_map(np.ones((0, 1, 1), bool), 8, 8, 8, 8, is_causal=True),
            r"block_map has shape \(0, 1, 1\)",
        ),
        (
            lambda: BlockMask.from_rule(Strided(4, 2, 4), 8, is_causal=True).take_heads(3, 2),
            "first=3 and count=2 must lie within the 4 pattern heads",
        ),
        (
            lambda: BlockMask.from_rule(Strided(4, 2, 4), 8, is_causal=True).take_heads(0, 0),
            "count=0 must be at least 1",
        ),
        (
            lambda: BlockMask.from_rule(Strided(4, 2, 4), 8, is_causal=True).take_heads(-1, 2),
            "first=-1 must not be negative",
        ),
        (
            lambda: BlockMask.from_rule(Strided(4, 2, 4), 8, is_causal=True).take_heads(0.5, 2),
            "first=0.5 must be an integer",
        ),
    ],
)
def test_bad_input(build, message, untyped):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("phase_by", "head"), ("stripes", "both")])
def test_bad_choice(name, value, untyped):
    with pytest.raises(ValueError, match=f"{name}='{value}' must be one of"):
        Strided(8, 2, 4, **{name: value})


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(6))
def test_flex_attention_makes_the_same_tables(seed):
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    rng = np.random.default_rng(seed)
    rule = Strided(16, int(rng.integers(1, 6)), 4, left=int(rng.integers(1, 4)))
    queries, keys = (int(n) for n in rng.integers(100, 300, 2))
    query_tile, key_tile = (int(n) for n in rng.choice([16, 32, 64], 2))
    mask = torch.tensor(tokens(rule, queries, keys, keys - queries, True, None))
    theirs = flex.create_block_mask(
        lambda _, head, query, key: mask[head, query, key],
        *(None, 4, queries, keys),
        device="cpu",
        BLOCK_SIZE=(query_tile, key_tile),
    )
    ours = BlockMask.from_rule(rule, queries, keys, query_tile, key_tile, is_causal=True)
    for table, (prefix, kind) in itertools.product(("kv", "q"), (("", PARTIAL), ("full_", FULL))):
        counts = getattr(theirs, f"{prefix}{table}_num_blocks")[0].numpy()
        indices = getattr(theirs, f"{prefix}{table}_indices")[0].numpy()
        kinds = kinds_map(ours, table, indices.shape[-1])
        np.testing.assert_array_equal((kinds == kind).sum(-1), counts)
        slots = np.arange(indices.shape[-1]) < counts[..., None]
        np.testing.assert_array_equal(np.nonzero(kinds == kind)[-1], indices[slots])


def test_tables_of_a_static_rule_are_on_the_host():
    block_mask = BlockMask.from_rule(RULES["strided"], 64, is_causal=True)
    for leaf in jax.tree.leaves(block_mask):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == (bool if leaf is block_mask.overflow else np.int32)
    assert jnp.asarray(block_mask.query_offset) == 0
