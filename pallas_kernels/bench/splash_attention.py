"""JAX's splash attention for TPU with the mask of a case, which it reads lazily."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float

from pallas_kernels.bench.cases import Case


class _Blocks(masks.Mask):
    """Tokens of one head's blocks under the causal triangle, made as slices are asked for."""

    def __init__(self, blocks: Bool[np.ndarray, "M M"], size: int) -> None:
        self._blocks = blocks
        self._size = size

    @property
    def shape(self) -> tuple[int, int]:
        """(T, S)."""
        rows, columns = self._blocks.shape
        return rows * self._size, columns * self._size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        query, key = (np.arange(n)[part] for n, part in zip(self.shape, index, strict=True))
        listed = self._blocks[np.ix_(query // self._size, key // self._size)]
        return listed & (query[:, None] >= key)


def of(case: Case, *, interpret: bool = False) -> Callable[..., Float[Array, "B T N H"]]:
    """Returns attention of query, key and value in tiles of up to 512 tokens."""
    group = case.heads // case.kv_heads
    by_head = [_Blocks(blocks, case.block_size) for blocks in case.block_map]
    mask = masks.MultiHeadMask([mask for mask in by_head for _ in range(group)])
    tile = min(512, case.length)
    sizes = kernel.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
    run = kernel.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)

    def attend(query: Array, key: Array, value: Array) -> Array:
        query = query * case.head_dim**-0.5  # splash has no scale
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.vmap(run)(query, key, value).swapaxes(1, 2)

    return attend
