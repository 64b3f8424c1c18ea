"""Tiles, heads and pipeline depths, by head dimension and by the pattern of the mask.

The default follows what the registers and the shared memory of a Hopper GPU hold, and
the widest tiles that the compiler builds without spilling in its inner loop. It is not
timed yet; `autotune` measures the alternatives.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import kernel_tables
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.mosaic_gpu import pieces
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target

# Heads are padded to multiples of what one swizzled row of shared memory holds.
HEAD_MULTIPLE = 64
LARGEST_HEAD = 256

# Of 227 KiB that a block may use; barriers, statistics and the compiler need the rest.
_SHARED_BYTES = 224 * 1024
_MOST_STAGES = 4
BYTES = 2
"""Of a number in a piece, bfloat16 or float16."""
ROWS = 64
"""Rows of a product that one warpgroup computes."""

Tiles = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How arrays are cut, who works on what, and the depths of the rings that TMA fills.

    Attributes:
        pieces: arrays of 16 bits whose sum a streamed array is.
        forward_heads: query heads of a block of the forward kernel's grid, which have one
            list: each warpgroup computes the same rows of another head.
        d_query_heads: the same in the kernel for dQ.
        takes_turns: whether the warpgroups of the forward kernel work in step: where
            each may have entries that the other skips, they would wait for nothing.
        forward_stages: key and value tiles in flight.
        d_query_stages: the same in the kernel for dQ.
        d_key_stages: query and dO tiles in flight in the kernel for dK and dV.
    """

    pieces: int
    forward_heads: int
    d_query_heads: int
    takes_turns: bool
    forward_stages: int
    d_query_stages: int
    d_key_stages: int


def tiles(call: Call) -> Tiles:
    """Returns (query, key) tiles of the forward kernel, that for dQ and that for dK, dV.

    A warpgroup has 64 rows, of queries in the first two and of keys in the third. Its
    registers hold sums of 64 x H, two of them for dK and dV, and one or two tiles of
    scores. Beyond H = 128 that is one sum per warpgroup, so that two of them share 64
    keys. float32 takes two or three times the shared memory: wide heads leave room for
    streamed tiles of 32.

    Two warpgroups share the keys of 128 queries, or of 64 queries of two heads where
    heads have one list and blocks are smaller: neighbours may have nothing in common.
    """
    dtype, block_mask = call.query.dtype, call.block_mask
    head, geometry = padded(call.query.shape[-1]), block_mask.geometry
    forward_rows, d_query_rows = _rows(call)
    if _has_pairs(call) and geometry.query_blocks > 1 and geometry.query_block_size % 128:
        forward_rows, d_query_rows = ROWS, ROWS
    if dtype == jnp.float32:
        streamed, d_key_rows = 64 if head <= 128 else 32, 128 if head == 64 else 64
        return (forward_rows, streamed), (d_query_rows, streamed), (streamed, d_key_rows)
    # Key tiles wider than the blocks would mostly compute what is masked.
    whole = geometry.key_blocks == 1 or block_mask.key_block_size % 128 == 0
    forward = (forward_rows, 128 if head <= 128 and whole else 64)
    return forward, (d_query_rows, 64), (64, 128 if head <= 128 else 64)


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns the plans of a call that there are, the default first."""
    head, block_mask = padded(call.query.shape[-1]), call.block_mask
    default = forward, d_query, d_key = tiles(call)
    choices = [default]
    for query_tile, key_tile in ((128, 128), (128, 64), (64, 128), (64, 64)):
        if head <= 128 or key_tile == 64:
            choices.append(((query_tile, key_tile), d_query, d_key))
    choices += [(forward, (rows, d_query[1]), d_key) for rows in {ROWS, _rows(call)[1]}]
    possible = (
        _plan(call, target, choice)
        for choice in choices
        if all(kernel_tables.refusal(block_mask, *sizes) is None for sizes in choice)
    )
    return tuple(dict.fromkeys(plan for plan in possible if _fits(plan)))


def _rows(call: Call) -> tuple[int, int]:
    """Returns rows of queries in a block of the forward kernel's grid, and of that for dQ."""
    head = padded(call.query.shape[-1])
    most = 128 if call.query.dtype == jnp.float32 else 192
    return 128, 128 if head <= most else 64


def _has_pairs(call: Call) -> bool:
    """Returns whether query heads come in pairs with one list."""
    return call.heads_with_one_list % 2 == 0


def _plan(call: Call, target: Target, choice: Tiles) -> Plan:
    block_mask = call.block_mask
    forward, d_query, d_key = (Tiling.of(block_mask, *sizes) for sizes in choice)
    dtype, head = call.query.dtype, padded(call.query.shape[-1])
    count = pieces.count(dtype)
    # Bytes of a token in a tile that stays, and in one that is streamed.
    own, row = head * dtype.itemsize, head * BYTES * count
    has_pairs = _has_pairs(call)
    forward_heads, d_query_heads = (
        rows // tiling.query_tile if has_pairs else 1
        for rows, tiling in zip(_rows(call), (forward, d_query), strict=True)
    )
    is_free = block_mask.rule is None and block_mask.query_block_size % forward.query_tile > 0
    options = Options(
        count,
        forward_heads,
        d_query_heads,
        forward_heads > 1 or not is_free,
        stages(forward_heads * forward.query_tile * own, 2 * forward.key_tile * row),
        stages(2 * d_query_heads * d_query.query_tile * own, 2 * d_query.key_tile * row),
        stages(2 * d_key.key_tile * own, 2 * d_key.query_tile * row),
    )
    return Plan(block_mask.geometry, forward, d_query, d_key, call.scores, target, options)


def _fits(plan: Plan) -> bool:
    options = plan.options
    return min(options.forward_stages, options.d_query_stages, options.d_key_stages) > 0


def padded(head_dim: int) -> int:
    """Returns the head dimension of what the kernels are given."""
    return -(-head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE


def stages(resident: int, stage: int) -> int:
    """Returns the depth of a ring: what fits beside the tiles that stay."""
    return min(_MOST_STAGES, (_SHARED_BYTES - resident) // stage)
