"""Attention within the tiles of a BlockMask: one function, several implementations."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention, explain
from pallas_kernels.block_sparse_attention.tuner import autotune

__all__ = ["autotune", "block_sparse_attention", "explain"]
