"""Query blocks too short to be tiles, several in one: it lists what any of them attends to.

Products of a row or a few are slow on any hardware. Which of its blocks attends to which keys is
told beside the list of a tile.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.block_mask import BlockMask

# Queries of a tile. Where neighbours choose apart, a larger one has more to list, and hide.
_TILE = 64


def joined(block_mask: BlockMask) -> tuple[BlockMask, Bool[Array, "*B Hp M J F"] | None]:
    """Returns the mask in tiles of F query blocks, and which of these attend to key blocks.

    None: it stays as it is. So do static masks, whose short lists are no map of all blocks, and
    those that a rule decides inside tiles.
    """
    count = min(_TILE // block_mask.query_block_size, block_mask.geometry.query_blocks)
    is_static = not isinstance(block_mask.kv_counts, jax.Array)
    if count < 2 or is_static or block_mask.inner_rule is not None or block_mask.is_anticausal:
        return block_mask, None
    block_map = block_mask.block_map()
    *front, num_blocks, num_keys = block_map.shape
    block_map = jnp.pad(block_map, [*[(0, 0)] * len(front), (0, -num_blocks % count), (0, 0)])
    blocks = block_map.reshape(*front, -1, count, num_keys).swapaxes(-1, -2)
    tiles = BlockMask.from_block_map(
        jnp.any(blocks, axis=-1),
        block_mask.query_length,
        block_mask.key_length,
        count * block_mask.query_block_size,
        block_mask.key_block_size,
        is_causal=block_mask.is_causal,
        window_size=block_mask.window_size,
        prefix_length=block_mask.prefix_length,
        query_offset=block_mask.query_offset,
    )
    return tiles, blocks
