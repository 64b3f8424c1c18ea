"""Selections of key blocks as callers bring them, checked: block maps and top-k indices."""

import numpy as np
from jaxtyping import Array, Bool, Shaped

from pallas_kernels import tiles
from pallas_kernels.checks import check_array, check_integer
from pallas_kernels.geometry import Geometry

Selection = Shaped[Array, "*B Hp M J"] | Shaped[np.ndarray, "*B Hp M J"]
Overflow = Bool[Array, "*B Hp"] | Bool[np.ndarray, "*B Hp"]


def check_block_map(block_map: Selection, geometry: Geometry) -> None:
    """Raises ValueError unless block_map is boolean and ends in (M, J)."""
    check_array("block_map", block_map)
    expected = (geometry.query_blocks, geometry.key_blocks)
    is_shaped = block_map.ndim in (3, 4) and block_map.shape[-2:] == expected
    if not is_shaped or 0 in block_map.shape:
        raise ValueError(
            f"block_map has shape {block_map.shape}, but these lengths and sizes make "
            f"{expected[0]} query blocks and {expected[1]} key blocks: pass "
            f"[heads, {expected[0]}, {expected[1]}], a batch axis in front is optional"
        )
    if block_map.dtype != bool:
        raise ValueError(f"block_map has dtype {block_map.dtype}: pass booleans, True = attended")


def from_indices(indices: Selection, geometry: Geometry) -> tuple[tiles.Mask, Overflow]:
    """Returns (block_map, overflow): what is named, and whether heads name unknown blocks.

    Raises:
        ValueError: indices are not integers [.., Hp, M, k], or those of a numpy array
            name a block that does not exist.
    """
    check_array("indices", indices)
    blocks = geometry.query_blocks
    is_shaped = indices.ndim in (3, 4) and indices.shape[-2] == blocks
    if not is_shaped or 0 in indices.shape:
        raise ValueError(
            f"indices has shape {indices.shape}, but there are {blocks} query blocks: pass "
            f"[heads, {blocks}, k], a batch axis in front is optional"
        )
    if not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"indices has dtype {indices.dtype}: pass integers, negative = none")
    if indices.dtype.itemsize < 4:  # There may be more blocks than it can count.
        indices = indices.astype(np.int32)
    xp = tiles.namespace(indices)
    if xp is np and indices.max() >= geometry.key_blocks:
        raise ValueError(
            f"indices names block {indices.max()}, but there are {geometry.key_blocks} key "
            "blocks, counted from 0"
        )
    is_known = indices < geometry.key_blocks
    block_map = tiles.scatter((indices >= 0) & is_known, indices, geometry.key_blocks)
    return block_map, xp.any(~is_known, axis=(-2, -1))


def cut(active: tiles.Mask, capacity: int) -> tuple[tiles.Mask, Overflow]:
    """Returns the first entries of each row, and whether heads lose any.

    Raises:
        ValueError: capacity is not positive, or too small for a numpy array.
    """
    check_integer("capacity", capacity)
    xp = tiles.namespace(active)
    rank = xp.cumsum(active, axis=-1, dtype=np.int32)
    overflow = (rank[..., -1] > capacity).any(-1)
    if xp is np and overflow.any():
        raise ValueError(
            f"capacity={capacity}, but a query block attends to {rank.max()} key blocks: "
            "pass at least that many"
        )
    return active & (rank <= capacity), overflow
