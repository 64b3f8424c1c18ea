"""What leaves for other programs: masks in bits, weights of 2:4 in half their bytes and a code."""

import ml_dtypes
import numpy as np
import pytest

from sparseformer_jax.sparsity import packing


def two_of_four(shape):
    order = np.argsort(np.random.default_rng(0).random((*shape[:-1], shape[-1] // 4, 4)), axis=-1)
    return (order < 2).reshape(shape)


# Half of the values, and half a byte for four entries.
@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 2.125), (ml_dtypes.bfloat16, 1.125), ("int8", 0.625)]
)
def test_compressed_weights_come_back(dtype, size):
    weights = np.random.default_rng(1).integers(-3, 3, (5, 24)).astype(dtype)
    kept = two_of_four(weights.shape)
    assert (weights[kept] == 0).any()  # a kept zero stays kept
    compressed = packing.compress(weights, kept)
    assert compressed.values.dtype == weights.dtype
    assert compressed.bytes_per_parameter == size
    dense, places = packing.decompress(compressed)
    np.testing.assert_array_equal(dense, np.where(kept, weights, 0))
    np.testing.assert_array_equal(places, kept)


def test_codes_are_those_of_sparse_tensor_cores():
    kept = np.array([[1, 1, 0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0, 0, 1]], bool)
    compressed = packing.compress(np.arange(16.0).reshape(2, 8), kept)
    np.testing.assert_array_equal(compressed.codes, [[4 | 13 << 4], [14 | 12 << 4]])
    np.testing.assert_array_equal(compressed.values, [[0, 1, 5, 7], [10, 11, 12, 15]])


@pytest.mark.parametrize("kept", [np.ones((2, 8), bool), two_of_four((2, 12))])
def test_only_whole_bytes_of_two_of_four_compress(kept):
    with pytest.raises(ValueError, match=r"must be 2:4 along rows of 8, 16, \.\.$"):
        packing.compress(np.zeros(kept.shape, np.float32), kept)


@pytest.mark.parametrize("shape", [(3, 8), (5, 3), (2, 3, 4)])
def test_masks_in_bits_come_back(shape):
    kept = np.random.default_rng(2).random(shape) < 0.5
    packed = packing.pack_bits(kept)
    assert packed.nbytes == -(-kept.size // 8)
    np.testing.assert_array_equal(packing.unpack_bits(packed, shape), kept)
    with pytest.raises(ValueError, match=f"^{packed.nbytes} bytes for a mask of 1000 entries"):
        packing.unpack_bits(packed, (10, 100))
