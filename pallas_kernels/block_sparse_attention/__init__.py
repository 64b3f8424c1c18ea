"""Attention within the tiles of a BlockMask: one function, several implementations."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention, explain

__all__ = ["block_sparse_attention", "explain"]
