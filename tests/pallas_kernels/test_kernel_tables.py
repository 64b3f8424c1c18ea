"""Kernel lists say what the mask says, for any blocks in tiles of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Local, Strided, kernel_tables, tiles
from pallas_kernels.kernel_tables import FULL, Lists, Segments, Tiling

SIZES = (4, 6, 8, 16, 24, 32)
CUTS = (kernel_tables.key_lists, kernel_tables.query_lists)


def random_problem(seed, capacity=None):
    """Returns a block map and how to make a mask of it, of random shape and limits."""
    rng = np.random.default_rng(seed)
    queries, keys = (int(n) for n in rng.integers(1, 100, 2))
    blocks = [int(n) for n in rng.choice(SIZES, 2)]
    leading = [(1,), (3,), (2, 1), (2, 3)][seed % 4]
    is_causal = bool(rng.integers(2))
    limits = {
        "is_causal": is_causal,
        "window_size": [None, int(rng.integers(1, 60))][rng.integers(2)],
        "prefix_length": [0, int(rng.integers(1, 60))][rng.integers(2)] if is_causal else 0,
        "query_offset": [None, int(rng.integers(-40, 60))][rng.integers(2)],
    }
    is_transposed = rng.random() < 0.3 and not limits["prefix_length"]
    density = rng.choice([0.1, 0.5, 0.9])
    block_map = rng.random((*leading, -(-queries // blocks[0]), -(-keys // blocks[1]))) < density

    def build(block_map):
        mask = BlockMask.from_block_map(
            block_map, queries, keys, *blocks, capacity=capacity, **limits
        )
        return mask.transpose() if is_transposed else mask

    return block_map, build


def random_tiling(mask, seed):
    """Returns tiles of random size that the mask can be cut into."""
    rng = np.random.default_rng(seed)
    while True:
        query_tile, key_tile = (int(n) for n in rng.choice(SIZES, 2))
        if kernel_tables.refusal(mask, query_tile, key_tile) is None:
            return Tiling.of(mask, query_tile, key_tile)


def traced_lists(build, tiling, block_map, segments=None):
    """Returns mask and lists as jit computes them, on the host."""

    @jax.jit
    def run(block_map, segments):
        mask = build(block_map)
        lists = [cut(mask, tiling, segments) for cut in CUTS]
        return mask, lists

    return jax.tree.map(np.asarray, run(block_map, segments))


def tokens(mask, tiling, lists, segments=None, by_query=True):
    """Expands lists and bits to pairs of tokens, checking every entry: [b, Hp, T, S]."""
    counts, tiles, bits = (np.asarray(table) for table in lists)
    geometry = mask.geometry
    query = np.arange(geometry.query_length)[:, None]
    key = np.arange(geometry.key_length)
    visible = geometry.pairs(query + int(mask.query_offset), key)
    shape = (*counts.shape[:2], geometry.query_length, geometry.key_length)
    shown, same = np.zeros(shape, bool), np.ones((1, *visible.shape), bool)
    if segments is not None:
        same = np.asarray(segments.query)[:, :, None] == np.asarray(segments.key)[:, None]
    for b, head, row in np.ndindex(counts.shape):
        count = counts[b, head, row]
        entries = tiles[b, head, row]
        assert count <= len(entries)
        assert (np.diff(entries[:count]) > 0).all()
        assert (entries[count:] == (entries[count - 1] if count else 0)).all()
        for number, word in zip(entries[:count], bits[b, head, row], strict=False):
            m, j = (row, number) if by_query else (number, row)
            i, k = query - m * tiling.query_tile, key - j * tiling.key_tile
            inside = (i >= 0) & (i < tiling.query_tile) & (k >= 0) & (k < tiling.key_tile)
            bit = i // tiling.query_granule * tiling.key_granules + k // tiling.key_granule
            says = (int(word) >> bit.clip(0, 31)) & 1 == 1
            allowed = visible & same[min(b, len(same) - 1)]
            if word == FULL:
                assert allowed[inside].all()
                assert inside.sum() == tiling.query_tile * tiling.key_tile
                says = True
            shown[b, head] |= inside & says & allowed
    return shown


def check(mask, tiling, lists, segments=None):
    expected = np.asarray(mask.to_dense())
    expected = expected if expected.ndim == 4 else expected[None]
    if segments is not None:
        query, key = (np.asarray(ids) for ids in segments)
        expected = expected & (query[:, None, :, None] == key[:, None, None, :])
    for table, by_query in zip(lists, (True, False), strict=True):
        shown = tokens(mask, tiling, table, segments, by_query)
        np.testing.assert_array_equal(shown, expected, err_msg=f"{mask.geometry}, {tiling}")


@pytest.mark.parametrize("seed", range(40))
def test_lists_and_bits_say_what_the_mask_says(seed):
    block_map, build = random_problem(seed)
    mask = build(block_map)
    for repeat in range(3):
        tiling = random_tiling(mask, 100 * seed + repeat)
        check(mask, tiling, [cut(mask, tiling, None) for cut in CUTS])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.representative("None-[0-3]", "2-[4-7]")
def test_traced_lists_are_long_enough(seed, capacity):
    block_map, build = random_problem(seed, capacity)
    tiling = random_tiling(random_problem(seed)[1](block_map), seed)
    mask, lists = traced_lists(build, tiling, block_map)
    check(mask, tiling, lists)


@pytest.mark.parametrize("seed", range(8))
def test_segments(seed):
    block_map, build = random_problem(seed)
    mask = build(block_map)
    rng = np.random.default_rng(seed)
    ids = [rng.integers(-1, 3, (2, n)) for n in (mask.query_length, mask.key_length)]
    ids = [np.sort(x, axis=1) if seed % 2 else x for x in ids]
    segments = Segments(*(x.astype(np.int32) for x in ids))
    tiling = random_tiling(mask, seed)
    check(mask, tiling, traced_lists(lambda _: mask, tiling, block_map, segments)[1], segments)


@pytest.mark.parametrize(
    ("rule", "tile"), [(Local(16, left=3), 16), (Strided(16, 3, num_heads=2), 64)], ids=str
)
def test_lists_hold_no_tile_without_pairs(rule, tile):
    mask = BlockMask.from_rule(rule, 200, is_causal=True)
    tiling = Tiling.of(mask, tile, tile)
    lists = kernel_tables.key_lists(mask, tiling, None)
    pairs = np.pad(mask.to_dense(), ((0, 0), (0, -200 % tile), (0, -200 % tile)))
    blocks = len(pairs[0]) // tile
    some = pairs.reshape(-1, blocks, tile, blocks, tile).any((2, 4))
    np.testing.assert_array_equal(lists.counts[0], some.sum(-1))


def test_capacity_of_traced_lists_follows_that_of_the_mask():
    block_map = np.ones((1, 8, 8), bool)

    def lists(block_map, tile):
        mask = BlockMask.from_block_map(
            block_map, 64, 64, 8, 8, is_causal=False, capacity=2, query_offset=0
        )
        return kernel_tables.key_lists(mask, Tiling.of(mask, tile, tile), None)

    for tile, capacity in ((4, 4), (8, 2), (16, 4), (32, 2)):
        traced: Lists = jax.jit(lists, static_argnums=1)(block_map, tile)
        assert traced.tiles.shape[-1] == capacity


def test_refusals():
    mask = BlockMask.from_rule(Local(16), 64, 64, 16, 16, is_causal=True, query_offset=3)
    assert "let query_offset be a multiple" in kernel_tables.refusal(mask, 16, 16)
    mask = BlockMask.from_block_map(np.ones((1, 8, 8), bool), 64, 64, 8, 8, is_causal=True)
    assert "need more than 32 bits in tiles of 64 x 64" in kernel_tables.refusal(mask, 64, 64)
    # A block that holds everything says nothing about granules.
    one = BlockMask.from_block_map(np.ones((1, 1, 1), bool), 60, 60, 60, 60, is_causal=True)
    assert kernel_tables.refusal(one, 64, 64) is None
    assert dataclasses.astuple(Tiling.of(one, 64, 64)) == (64, 64, 64, 64)


def test_traced_programs_hold_no_table():
    """What follows from lengths alone is computed, not stored: only vectors are constants."""

    mask = jax.eval_shape(
        lambda x: BlockMask.from_block_map(x, 8192, 8192, 64, 64, is_causal=True, query_offset=0),
        jax.ShapeDtypeStruct((1, 128, 128), bool),
    )
    closed = jax.make_jaxpr(
        lambda mask: kernel_tables.key_lists(mask, Tiling.of(mask, 128, 128), None)
    )(mask)
    assert max(np.size(constant) for constant in closed.consts) <= 128


def test_lists_expand_alike_on_every_platform():
    rng = np.random.default_rng(0)
    block_map = rng.random((2, 3, 5, 9)) < 0.4
    counts, indices, _ = tiles.compact(block_map.astype(np.int32))
    listed = jnp.arange(indices.shape[-1]) < counts[..., None]
    np.testing.assert_array_equal(tiles.expand(counts, indices, 9), block_map)
    np.testing.assert_array_equal(tiles.expand(counts, jnp.asarray(indices), 9), block_map)
    np.testing.assert_array_equal(tiles._found(listed, jnp.asarray(indices), 9), block_map)


def test_lists_of_the_host_at_a_traced_offset():
    mask = BlockMask.from_rule(Local(16), 64, is_causal=False, query_offset=0)
    tiling = Tiling.of(mask, 32, 32)
    expected = kernel_tables.key_lists(mask.tightened(True, None, np.int32(7)), tiling, None)
    found = jax.jit(
        lambda offset: kernel_tables.key_lists(mask.tightened(True, None, offset), tiling, None)
    )(7)
    np.testing.assert_array_equal(found.counts, expected.counts)
    width = expected.bits.shape[-1]
    np.testing.assert_array_equal(found.bits[..., :width], expected.bits)
