"""What is timed: causal attention under random blocks of a given density."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.checks import check_integer
from pallas_kernels.rules import Dense


@dataclasses.dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        length: T = S in tokens, a multiple of block_size.
        density: share of the causal blocks that is kept; 1 is dense attention.
        head_dim: H.
        heads: N.
        kv_heads: K; each has a pattern of its own.
        block_size: tokens in a block.
        dtype: name of the dtype of query, key and value.

    Raises:
        ValueError: a size is not positive, density not above 0 and at most 1, length no
            multiple of block_size, or kv_heads does not divide.
    """

    length: int
    density: float
    head_dim: int
    heads: int
    kv_heads: int
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("length", "head_dim", "heads", "kv_heads", "block_size"):
            check_integer(name, getattr(self, name))
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be above 0 and at most 1")
        if self.length % self.block_size:
            raise ValueError(f"length={self.length} must be a multiple of {self.block_size}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")

    @functools.cached_property
    def block_map(self) -> Bool[np.ndarray, "K M M"]:
        """The diagonal, and random blocks below it up to the density."""
        blocks = self.length // self.block_size
        row, column = np.tril_indices(blocks, -1)
        kept = round(self.density * blocks * (blocks + 1) / 2) - blocks
        rng = np.random.default_rng(0)
        selected = np.repeat(np.eye(blocks, dtype=bool)[None], self.kv_heads, axis=0)
        for pattern in selected:
            chosen = rng.permutation(len(row))[: max(0, kept)]
            pattern[row[chosen], column[chosen]] = True
        return selected

    def block_mask(self) -> BlockMask:
        """Returns the selection as a mask."""
        if self.density == 1:
            return BlockMask.from_rule(Dense(), self.length, is_causal=True)
        sizes = (self.length, self.length, self.block_size, self.block_size)
        return BlockMask.from_block_map(self.block_map, *sizes, is_causal=True)

    def arrays(self) -> tuple[Float[Array, "B T N H"], ...]:
        """Returns query, key, value and the gradient of the output: random, not zeros."""
        dtype = jnp.dtype(self.dtype)
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(1, self.length, n, self.head_dim) for n in heads]
        draws = zip(keys, shapes, strict=True)
        return tuple(jax.random.normal(key, shape, dtype) for key, shape in draws)

    def flops(self) -> dict[str, float]:
        """Returns operations on the visible pairs: 4 H forward and 10 H backward each."""
        size = self.block_size
        diagonal = self.kv_heads * (self.length // size)
        below = int(self.block_map.sum()) - diagonal
        pairs = below * size**2 + diagonal * size * (size + 1) / 2
        per_pass = self.head_dim * pairs * self.heads / self.kv_heads
        return {"forward": 4 * per_pass, "backward": 10 * per_pass}
