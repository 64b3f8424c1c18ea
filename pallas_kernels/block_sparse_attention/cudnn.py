"""Dense flash attention by cuDNN, for masks that turn out to list every tile.

A mask as an array would cost [T, S] memory and, by the figures published for Hopper,
more time than the kernels that read lists. So a mask with a gap is never sent here.

Its backward pass adds to dQ in an order that changes from run to run, unless XLA asks it not
to: for a whole program, by a flag. So without that flag it is only taken by name.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.rules import Dense
from pallas_kernels.targets import Target

_LARGEST_HEAD_DIM = {8: 128, 9: 256, 10: 128}
# The second and third axis of a grid end there.
_LARGEST_BATCH = 65535
# Either tells XLA to ask cuDNN for an algorithm with one order of sums.
_DETERMINISM = r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)"


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there; None when it can."""
    if target.platform != "cuda" or target.compute_capability is None:
        return f"cuDNN needs an NVIDIA GPU, not {target.platform}"
    head_dim = call.query.shape[-1]
    largest = _LARGEST_HEAD_DIM.get(target.compute_capability // 10)
    if largest is None:
        return f"compute capability {target.compute_capability / 10} has no cuDNN attention"
    if head_dim > largest or head_dim % 8:
        return f"head_dim={head_dim} must be a multiple of 8 and at most {largest}"
    if call.query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16, not {call.query.dtype}"
    batch = call.query.shape[0]
    if batch > _LARGEST_BATCH:
        return f"batch={batch} must be at most {_LARGEST_BATCH}, CUDA's limit on a grid"
    if call.return_lse:
        return "it has no gradient through the log-sum-exp that return_lse asks for"
    return _reason_to_need_a_mask(call)


def reservation(call: Call) -> str | None:
    """Returns why it is not taken where the best one is asked for; None if it is."""
    if re.search(_DETERMINISM, os.environ.get("XLA_FLAGS", "")):
        return None
    return (
        "its gradients change from run to run: name it, or set "
        "XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true"
    )


def attend(
    call: Call, target: Target
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None]:
    """Returns (out, None)."""
    out = jax.nn.dot_product_attention(
        call.query,
        call.key,
        call.value,
        scale=call.scores.scale,
        is_causal=call.block_mask.is_causal,
        implementation="cudnn",
    )
    return out, None


def _reason_to_need_a_mask(call: Call) -> str | None:
    block_mask = call.block_mask
    if call.segment_ids is not None:
        return "segment_ids would need a mask of [T, S]"
    if call.scores.soft_cap is not None:
        return "it has no logits_soft_cap"
    geometry = block_mask.geometry
    if geometry.window_size is not None or geometry.prefix_length or geometry.is_anticausal:
        return "a window, a prefix or reversed causality would need a mask of [T, S]"
    if not isinstance(block_mask.query_offset, np.ndarray) or block_mask.query_offset != 0:
        return "the first query must sit on the first key"
    if not _lists_everything(block_mask):
        return "block_mask leaves tiles out, or is not known while compiling"
    return None


def _lists_everything(block_mask: BlockMask) -> bool:
    """Returns whether the mask is known to be that of dense attention."""
    if isinstance(block_mask.rule, Dense):
        return True
    if block_mask.inner_rule is not None or not isinstance(block_mask.kv_counts, np.ndarray):
        return False
    visible, _, _ = tiles.rule_tiles(Dense(), block_mask.geometry, 0)
    return bool((block_mask.block_map() | ~visible).all())
