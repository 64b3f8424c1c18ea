"""Masks from selections: top-k indices, and capacities that are too small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask

LENGTHS = (30, 45, 8, 8)  # Queries, keys and tiles: 4 x 6 blocks, ragged.
OVERFULL = np.random.default_rng(3).random((2, 4, 6)) < 0.7


def spread(block_map):
    return np.repeat(np.repeat(block_map, 8, -2), 8, -1)[..., :30, :45]


def first(block_map, capacity):
    return block_map & (np.cumsum(block_map, -1) <= capacity)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_top_k_is_its_block_map(batch):
    indices = np.random.default_rng(0).integers(-2, 6, (*batch, 2, 4, 3))
    block_map = (indices[..., None] == np.arange(6)).any(-2)
    build = functools.partial(BlockMask.from_top_k, is_causal=True)
    expected = BlockMask.from_block_map(block_map, *LENGTHS, is_causal=True)
    static = build(indices, *LENGTHS)
    traced = jax.jit(lambda indices: build(indices, *LENGTHS))(indices)
    assert traced.kv_indices.shape[-1] == 3
    for mask in (static, traced):
        np.testing.assert_array_equal(mask.to_dense(), expected.to_dense())
        np.testing.assert_array_equal(
            mask.transpose().block_map().swapaxes(-1, -2), expected.block_map()
        )
        assert not mask.overflow.any()


def test_unknown_blocks_are_left_out_and_told():
    indices = jnp.asarray([[[0, 6]] * 4, [[1, -1]] * 4])
    mask = BlockMask.from_top_k(indices, *LENGTHS, is_causal=False)
    np.testing.assert_array_equal(mask.overflow, [True, False])
    assert (mask.kv_counts == 1).all()


@pytest.mark.parametrize("capacity", [1, 3, 6])
def test_capacity_keeps_the_first_blocks_of_each_row(capacity):
    build = jax.jit(
        lambda x: BlockMask.from_block_map(x, *LENGTHS, is_causal=False, capacity=capacity)
    )
    full, empty = np.ones((1, 4, 6), bool), np.zeros((1, 4, 6), bool)
    block_map = np.concatenate([OVERFULL, full, empty])
    mask = build(block_map)
    kept = first(block_map, capacity)
    assert mask.kv_indices.shape[-1] == capacity
    np.testing.assert_array_equal(mask.to_dense(), spread(kept))
    # Both orientations, so that gradients are those of what was attended to.
    np.testing.assert_array_equal(mask.transpose().block_map().swapaxes(-1, -2), kept)
    np.testing.assert_array_equal(mask.overflow, (kept != block_map).any((-2, -1)))


def test_overflow_counts_what_causality_leaves():
    everything = jnp.ones((1, 4, 6), bool)
    build = functools.partial(BlockMask.from_block_map, everything, *LENGTHS, query_offset=0)
    assert build(is_causal=False, capacity=4).overflow.all()
    assert not build(is_causal=True, capacity=4).overflow.any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: BlockMask.from_block_map(
                np.ones((1, 4, 6), bool), *LENGTHS, is_causal=False, capacity=4
            ),
            "capacity=4, but a query block attends to 6 key blocks",
        ),
        (
            lambda: BlockMask.from_block_map(
                np.ones((1, 4, 6), bool), *LENGTHS, is_causal=False, capacity=0
            ),
            "capacity=0 must be at least 1",
        ),
        (
            lambda: BlockMask.from_block_map(
                np.ones((1, 4, 6), bool), *LENGTHS, is_causal=False, capacity=6.0
            ),
            r"capacity=6\.0 must be an integer",
        ),
        (
            lambda: BlockMask.from_top_k([[[0]]], *LENGTHS, is_causal=True),
            "indices is list: pass an array",
        ),
        (
            lambda: BlockMask.from_top_k(np.zeros((0, 4, 2), int), *LENGTHS, is_causal=True),
            r"indices has shape \(0, 4, 2\)",
        ),
        (
            lambda: BlockMask.from_top_k(np.zeros((1, 3, 2), int), *LENGTHS, is_causal=True),
            r"indices has shape \(1, 3, 2\), but there are 4 query blocks: pass \[heads, 4, k\]",
        ),
        (
            lambda: BlockMask.from_top_k(np.zeros((1, 4, 0), int), *LENGTHS, is_causal=True),
            r"indices has shape \(1, 4, 0\)",
        ),
        (
            lambda: BlockMask.from_top_k(np.zeros((1, 4, 2)), *LENGTHS, is_causal=True),
            "indices has dtype float64: pass integers",
        ),
        (
            lambda: BlockMask.from_top_k(np.full((1, 4, 2), 6), *LENGTHS, is_causal=True),
            "indices names block 6, but there are 6 key blocks, counted from 0",
        ),
    ],
)
def test_bad_input(build, message, untyped):
    with pytest.raises(ValueError, match=message):
        build()


def test_indices_of_a_narrow_type():
    """More blocks than the type can count."""
    indices = np.asarray([[[0, 3]], [[-1, 127]]], np.int8)
    for given in (indices, jnp.asarray(indices)):
        mask = BlockMask.from_top_k(given, 8, 200 * 8, 8, 8, is_causal=False)
        np.testing.assert_array_equal(mask.kv_counts, [[2], [1]])
        np.testing.assert_array_equal(mask.kv_indices[:, 0], [[0, 3], [127, 127]])
        assert not mask.overflow.any()
