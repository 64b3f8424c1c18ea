"""Block maxima of attention weights: what learned block selections are trained on."""

from pallas_kernels.block_max.api import block_max_attention

__all__ = ["block_max_attention"]
