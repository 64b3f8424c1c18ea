"""Tiles and pipeline depths, by head dimension and by the blocks of the mask.

The default follows what the registers and the shared memory of a Hopper GPU hold, and
the widest tiles that the compiler builds without spilling in its inner loop. It is not
timed yet; `autotune` measures the alternatives.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels import kernel_tables
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.mosaic_gpu import pieces
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target

# Heads are padded to multiples of what one swizzled row of shared memory holds.
HEAD_MULTIPLE = 64
_LARGEST_HEAD, _LARGEST_FLOAT32_HEAD = 256, 128

# Of 227 KiB that a block may use; barriers, statistics and the compiler need the rest.
_SHARED_BYTES = 224 * 1024
_MOST_STAGES = 4
BYTES = 2
"""Of a number in a piece, bfloat16 or float16."""

Tiles = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How arrays are cut, and the depths of the rings that TMA fills.

    Attributes:
        pieces: arrays of 16 bits whose sum an array is.
        forward_stages: key and value tiles in flight.
        d_query_stages: the same in the kernel for dQ.
        d_key_stages: query and dO tiles in flight in the kernel for dK and dV.
    """

    pieces: int
    forward_stages: int
    d_query_stages: int
    d_key_stages: int


def largest_head(dtype: Any) -> int:
    """Returns the largest head dimension whose tiles fit in shared memory."""
    return _LARGEST_FLOAT32_HEAD if dtype == jnp.float32 else _LARGEST_HEAD


def tiles(head_dim: int, dtype: Any, block_mask: BlockMask) -> Tiles:
    """Returns (query, key) tiles of the forward kernel, that for dQ and that for dK, dV.

    A warpgroup has 64 rows, of queries in the first two and of keys in the third. Its
    registers hold sums of 64 x H, two of them for dK and dV, and one or two tiles of
    scores. Beyond H = 128 that is one sum per warpgroup, so that two of them share 64
    keys. float32 fills the shared memory with a third of the numbers.
    """
    head = padded(head_dim)
    if dtype == jnp.float32:
        rows = 128 if head == 64 else 64
        return (128, 64), (rows, 64), (64, rows)
    # Key tiles wider than the blocks would mostly compute what is masked.
    whole = block_mask.geometry.key_blocks == 1 or block_mask.key_block_size % 128 == 0
    forward = (128, 128 if head <= 128 and whole else 64)
    d_query = (128 if head <= 192 else 64, 64)
    return forward, d_query, (64, 128 if head <= 128 else 64)


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns the plans of a call that there are, the default first."""
    head, block_mask = padded(call.query.shape[-1]), call.block_mask
    default = forward, d_query, d_key = tiles(head, call.query.dtype, block_mask)
    choices = [default]
    for query_tile, key_tile in ((128, 128), (128, 64), (64, 64)):
        if head <= 128 or key_tile == 64:
            choices.append(((query_tile, key_tile), d_query, d_key))
    choices.append((forward, (64, 64), d_key))
    possible = (
        _plan(call, target, choice)
        for choice in choices
        if all(kernel_tables.refusal(block_mask, *sizes) is None for sizes in choice)
    )
    return tuple(dict.fromkeys(plan for plan in possible if _fits(plan)))


def _plan(call: Call, target: Target, choice: Tiles) -> Plan:
    forward, d_query, d_key = (Tiling.of(call.block_mask, *sizes) for sizes in choice)
    count = pieces.count(call.query.dtype)
    row = BYTES * count * padded(call.query.shape[-1])
    options = Options(
        count,
        stages(forward.query_tile * row, 2 * forward.key_tile * row),
        stages(2 * d_query.query_tile * row, 2 * d_query.key_tile * row),
        stages(2 * d_key.key_tile * row, 2 * d_key.query_tile * row),
    )
    geometry = call.block_mask.geometry
    return Plan(geometry, forward, d_query, d_key, call.scores, target, options)


def _fits(plan: Plan) -> bool:
    options = plan.options
    return min(options.forward_stages, options.d_query_stages, options.d_key_stages) > 0


def padded(head_dim: int) -> int:
    """Returns the head dimension of what the kernels are given."""
    return -(-head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE


def stages(resident: int, stage: int) -> int:
    """Returns the depth of a ring: what fits beside the tiles that stay."""
    return min(_MOST_STAGES, (_SHARED_BYTES - resident) // stage)
