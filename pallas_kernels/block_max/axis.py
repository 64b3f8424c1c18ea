"""Tokens of one side, cut into blocks, and these into the tiles that loops read.

Hardware wants round tile sizes, and blocks and lengths are what they are. So blocks are
padded by repeating their last token, and the sequence by repeating its last: a token
that counts twice changes no maximum, and nothing needs a mask but what rows see.
"""

import dataclasses
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Shaped

from pallas_kernels.geometry import Geometry

_Indices = TypeVar("_Indices", Int[np.ndarray, "..."], Int[Array, "..."])


@dataclasses.dataclass(frozen=True)
class Axis:
    """One side of a problem.

    Attributes:
        length: tokens.
        block: tokens in a block.
        padded: tokens in a block after padding: block itself, or a power of two.
        tile: tokens that are read at once, a multiple or a divisor of padded.
    """

    length: int
    block: int
    padded: int
    tile: int

    @property
    def blocks(self) -> int:
        """Blocks; the last may be ragged."""
        return -(-self.length // self.block)

    @property
    def tiles(self) -> int:
        """Tiles that hold every block."""
        return -(-self.blocks * self.padded // self.tile)

    @property
    def blocks_in_tile(self) -> int:
        """Blocks in a tile; 1 when a block has several tiles."""
        return max(1, self.tile // self.padded)

    @property
    def tiles_in_block(self) -> int:
        """Tiles in a block; 1 when a tile has several blocks."""
        return max(1, self.padded // self.tile)

    @property
    def slots(self) -> int:
        """Blocks that the tiles hold, padding counted."""
        return self.tiles * self.blocks_in_tile // self.tiles_in_block

    def token(self, index: _Indices) -> _Indices:
        """Returns the token that stands at an index of the padded sequence."""
        if self.padded != self.block:
            within = index & (self.padded - 1)
            start = (index >> (self.padded.bit_length() - 1)) * self.block
            index = start + within.clip(max=self.block - 1)
        return index.clip(max=self.length - 1)

    def tile_of(self, token: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the tile of a token, or of the nearest one that exists."""
        token = token.clip(0, self.length - 1)
        if self.padded != self.block:
            block = np.int32(self.block)
            token = lax.div(token, block) * self.padded + lax.rem(token, block)
        return lax.div(token, np.int32(self.tile))

    def cut(self, array: Shaped[Array, "B L ..."]) -> Shaped[Array, "B P ..."]:
        """Returns the padded sequence, tiles * tile tokens."""
        tokens = self.token(np.arange(self.tiles * self.tile))
        if len(tokens) == self.length:
            return array
        return jnp.take(array, tokens, axis=1, mode="clip")


def visible_tiles(
    geometry: Geometry, keys: Axis, first_query: Int[Array, ""], last_query: Int[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns (start, stop) of the key tiles that some position of a range may see."""
    least, most = geometry.reach
    last_key = last_query - least
    if geometry.prefix_length:
        in_prefix = (last_query + most).clip(max=geometry.prefix_length - 1)
        last_key = jnp.maximum(last_key, in_prefix)
    start = keys.tile_of(first_query - most)
    return start, jnp.where(last_key < 0, start, keys.tile_of(last_key) + 1)


def power_of_two(number: int) -> int:
    """Returns the least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
