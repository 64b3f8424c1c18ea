"""Tiles and pipeline depths, by head dimension and by the blocks of the mask.

The default follows what the registers and the shared memory of a Hopper GPU hold, and
the widest tiles that the compiler builds without spilling in its inner loop. It is not
timed yet; `autotune` measures the alternatives.
"""

import dataclasses

from pallas_kernels import kernel_tables
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target

# Heads are padded to multiples of what one swizzled row of shared memory holds.
HEAD_MULTIPLE = 64
LARGEST_HEAD = 256

# Of 227 KiB that a block may use; barriers, statistics and the compiler need the rest.
_SHARED_BYTES = 224 * 1024
_MOST_STAGES = 4
_BYTES = 2  # bfloat16 or float16

Tiles = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Depths of the rings that TMA fills.

    Attributes:
        forward_stages: key and value tiles in flight.
        d_query_stages: the same in the kernel for dQ.
        d_key_stages: query and dO tiles in flight in the kernel for dK and dV.
    """

    forward_stages: int
    d_query_stages: int
    d_key_stages: int


def tiles(head_dim: int, block_mask: BlockMask) -> Tiles:
    """Returns (query, key) tiles of the forward kernel, that for dQ and that for dK, dV.

    A warpgroup has 64 rows, of queries in the first two and of keys in the third. Its
    registers hold sums of 64 x H, two of them for dK and dV, and one or two tiles of
    scores. Beyond H = 128 that is one sum per warpgroup, so that two of them share 64
    keys.
    """
    head = _padded(head_dim)
    # Key tiles wider than the blocks would mostly compute what is masked.
    whole = block_mask.geometry.key_blocks == 1 or block_mask.key_block_size % 128 == 0
    forward = (128, 128 if head <= 128 and whole else 64)
    d_query = (128 if head <= 192 else 64, 64)
    return forward, d_query, (64, 128 if head <= 128 else 64)


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns the plans of a call that there are, the default first."""
    head, block_mask = _padded(call.query.shape[-1]), call.block_mask
    default = forward, d_query, d_key = tiles(head, block_mask)
    choices = [default]
    for query_tile, key_tile in ((128, 128), (128, 64), (64, 64)):
        if head <= 128 or key_tile == 64:
            choices.append(((query_tile, key_tile), d_query, d_key))
    choices.append((forward, (64, 64), d_key))
    found = dict.fromkeys(
        _plan(call, target, choice)
        for choice in choices
        if all(kernel_tables.refusal(block_mask, *sizes) is None for sizes in choice)
    )
    return tuple(found)


def _plan(call: Call, target: Target, choice: Tiles) -> Plan:
    forward, d_query, d_key = (Tiling.of(call.block_mask, *sizes) for sizes in choice)
    row = _BYTES * _padded(call.query.shape[-1])
    options = Options(
        _stages(forward.query_tile * row, 2 * forward.key_tile * row),
        _stages(2 * d_query.query_tile * row, 2 * d_query.key_tile * row),
        _stages(2 * d_key.key_tile * row, 2 * d_key.query_tile * row),
    )
    geometry = call.block_mask.geometry
    return Plan(geometry, forward, d_query, d_key, call.scores, target, options)


def _padded(head_dim: int) -> int:
    return -(-head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE


def _stages(resident: int, stage: int) -> int:
    """Returns the depth of a ring: what fits beside the tiles that stay."""
    return min(_MOST_STAGES, (_SHARED_BYTES - resident) // stage)
