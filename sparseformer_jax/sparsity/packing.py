"""Masks in bits, and weights of 2:4 in their compressed form, on the host."""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from sparseformer_jax.sparsity.nm import (
    MOST_CANDIDATES,
    Pattern,
    candidates,
    groups_on_host,
    holds,
)

_TWO_OF_FOUR = Pattern(2, 4)


def pack_bits(kept: Bool[np.ndarray, "*S"]) -> UInt8[np.ndarray, " bytes"]:
    """Returns a mask at one bit an entry, in row-major order, the highest bit of a byte first."""
    return np.packbits(kept.reshape(-1))


def unpack_bits(packed: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the mask of a shape that `pack_bits` was given.

    Raises:
      ValueError: the bytes are of another number of entries.
    """
    size = int(np.prod(shape))
    if packed.size != -(-size // 8):
        raise ValueError(f"{packed.size} bytes for a mask of {size} entries, which {shape} has")
    return np.unpackbits(packed, count=size).astype(bool).reshape(shape)


def bits_of_group(pattern: Pattern) -> int | None:
    """Returns the bits that number the masks of a group, 3 of 2:4; None where there are too many.

    They are less than one an entry: 0.75 of 2:4, 0.5 of 1:4.
    """
    number = math.comb(pattern.m, pattern.n)
    return (number - 1).bit_length() if number <= MOST_CANDIDATES else None


def pack_groups(kept: Bool[np.ndarray, "*S"], pattern: Pattern) -> UInt8[np.ndarray, " bytes"]:
    """Returns a mask of n:m along its last axis as numbers of `candidates`, a group after another.

    Each has `bits_of_group` bits, the highest first.

    Raises:
      ValueError: groups have too many masks, or the mask is not n:m.
    """
    width = bits_of_group(pattern)
    if width is None or not holds(kept, pattern, axis=-1):
        raise ValueError(f"a mask of shape {kept.shape}: is not {pattern}, or that has too many")
    grouped = groups_on_host(kept, pattern.m, -1).reshape(-1, pattern.m)
    # Of n entries all are shared with one candidate only.
    shared = grouped.astype(np.float32) @ candidates(pattern.n, pattern.m).T.astype(np.float32)
    places = np.arange(width)[::-1]
    return np.packbits((np.argmax(shared, axis=1)[:, None] >> places).astype(np.uint8) & 1)


def unpack_groups(
    packed: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], pattern: Pattern
) -> Bool[np.ndarray, "*S"]:
    """Returns the mask of a shape that `pack_groups` was given.

    Raises:
      ValueError: the bytes are of another number of groups, or hold a number that is no mask's.
    """
    width = bits_of_group(pattern)
    num_groups = math.prod(shape) // pattern.m
    if width is None or packed.size != -(-num_groups * width // 8):
        raise ValueError(f"{packed.size} bytes for a {pattern} mask of shape {shape}")
    bits = np.unpackbits(packed, count=num_groups * width).reshape(num_groups, width)
    numbers = bits @ (1 << np.arange(width)[::-1])
    table = candidates(pattern.n, pattern.m).astype(bool)
    if num_groups and numbers.max(initial=0) >= len(table):
        raise ValueError(f"{numbers.max()}: numbers no mask of {pattern}")
    return table[numbers.astype(np.int64)].reshape(shape)


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A matrix of 2:4 along its last axis: kept values and where they stand.

    A group that keeps places i < j has the code i + 4 j, as in sparse tensor cores; here in the
    order of the groups, two to a byte, the first in the lower half.

    Attributes:
      values: [R, C/2].
      codes: [R, C/8] bytes.
    """

    values: Shaped[np.ndarray, "R C2"]
    codes: UInt8[np.ndarray, "R C8"]

    @property
    def bytes_per_parameter(self) -> float:
        """Of values and codes together, over entries of the dense matrix."""
        return (self.values.nbytes + self.codes.nbytes) / (2 * self.values.size)


def compress(weights: Shaped[np.ndarray, "R C"], kept: Bool[np.ndarray, "R C"]) -> Compressed:
    """Returns the compressed form of the kept entries; a kept zero stays kept.

    Raises:
      ValueError: the mask is not 2:4 along the last axis, or that is no multiple of 8.
    """
    if weights.shape[-1] % 8 or not holds(kept, _TWO_OF_FOUR, axis=-1):
        raise ValueError(f"a mask of shape {kept.shape}: must be 2:4 along rows of 8, 16, ..")
    places = np.argsort(~groups_on_host(kept, 4, -1), axis=-1, kind="stable")[..., :2]
    values = np.take_along_axis(groups_on_host(weights, 4, -1), places, axis=-1)
    codes = (places[..., 0] + 4 * places[..., 1]).astype(np.uint8)
    rows = len(weights)
    return Compressed(values.reshape(rows, -1), codes[:, ::2] | codes[:, 1::2] << 4)


def decompress(compressed: Compressed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the dense matrix, zero where nothing is kept, and the mask."""
    rows, num_bytes = compressed.codes.shape
    codes = np.stack([compressed.codes & 15, compressed.codes >> 4], axis=-1)
    codes = codes.reshape(rows, 2 * num_bytes)
    places = np.stack([codes & 3, codes >> 2], axis=-1).astype(np.int64)
    dense = np.zeros((rows, 2 * num_bytes, 4), compressed.values.dtype)
    kept = np.zeros(dense.shape, bool)
    np.put_along_axis(dense, places, compressed.values.reshape(places.shape), axis=-1)
    np.put_along_axis(kept, places, True, axis=-1)
    return dense.reshape(rows, -1), kept.reshape(rows, -1)
