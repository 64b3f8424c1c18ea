"""Masks of groups as numbers."""

import itertools

import numpy as np
import pytest

from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.sparsity.packing import bits_of_group, pack_groups, unpack_groups


def test_numbers_are_those_of_candidates_highest_bit_first():
    masks = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]  # 0, 5, 3
    packed = pack_groups(np.array(masks, bool), Pattern(2, 4))
    np.testing.assert_array_equal(packed, [0b00010101, 0b10000000])


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [((2, 4), 3), ((1, 4), 2), ((4, 8), 7), ((3, 6), 5), ((1, 1), 0), ((1, 8), 3)],
)
def test_round_trip(pattern, bits):
    n, m = pattern
    assert bits_of_group(Pattern(n, m)) == bits
    rows = [list(kept) for kept in itertools.combinations(range(m), n)]
    mask = np.zeros((len(rows), m), bool)
    np.put_along_axis(mask, np.array(rows), True, axis=1)
    mask = np.concatenate([mask, mask[::-1]], axis=1)
    packed = pack_groups(mask, Pattern(n, m))
    assert packed.size == -(-2 * len(rows) * bits // 8)
    np.testing.assert_array_equal(unpack_groups(packed, mask.shape, Pattern(n, m)), mask)


def test_refusals():
    two_of_four = Pattern(2, 4)
    with pytest.raises(ValueError, match="is not 2:4"):
        pack_groups(np.ones((1, 4), bool), two_of_four)
    with pytest.raises(ValueError, match="is not 8:16"):
        pack_groups(np.arange(16)[None] < 8, Pattern(8, 16))
    with pytest.raises(ValueError, match="2 bytes for a 2:4 mask"):
        unpack_groups(np.zeros(2, np.uint8), (1, 4), two_of_four)
    with pytest.raises(ValueError, match="7: numbers no mask of 2:4"):
        unpack_groups(np.full(1, 255, np.uint8), (1, 4), two_of_four)
