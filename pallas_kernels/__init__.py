"""Block-sparse attention kernels for JAX, importable on their own."""

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_max import block_max_attention
from pallas_kernels.block_sparse_attention import autotune, block_sparse_attention, explain
from pallas_kernels.rules import Dense, Local, Rule, Strided

__all__ = [
    "BlockMask",
    "Dense",
    "Local",
    "Rule",
    "Strided",
    "autotune",
    "block_max_attention",
    "block_sparse_attention",
    "explain",
]
