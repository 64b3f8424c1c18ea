"""Tiles, warps and stages of the Triton kernels, by machine, head dimension and mask.

The Hopper figures start from those published for causal attention on an H100: tiles of
128 x 128, 3 stages and 8 warps forward. The others are the widest that the compiler
builds within the shared memory of the machine without spilling registers. Not one of
them is timed yet; `autotune` measures the alternatives.
"""

import dataclasses

import numpy as np

from pallas_kernels import kernel_tables
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target
from pallas_kernels.triton_call import Resources

MAX_HEAD_DIM = 256

# Rows that a product on tensor cores wants, and what will do for its columns.
_ROWS, _COLUMNS = 64, 32
# Where shrinking ends that makes the bits of fine blocks fit into a word.
_SMALLEST = (32, 16)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tile sizes in tokens, and what a program runs on."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Query and key tile."""
        return self.query_tile, self.key_tile

    @property
    def resources(self) -> Resources:
        """Warps and stages."""
        return Resources(self.warps, self.stages)

    def tiling(self, block_mask: BlockMask) -> Tiling:
        """Returns the tiling of a mask."""
        return Tiling.of(block_mask, *self.tiles)

    def within(self, query_tile: int, key_tile: int) -> "Shape":
        """Returns it with tiles no larger than these."""
        tiles = (min(self.query_tile, query_tile), min(self.key_tile, key_tile))
        return Shape(*tiles, self.warps, self.stages)

    def shrunk(self) -> "Shape":
        """Returns it with half the larger tile, or the smaller where that is at its least."""
        query_tile, key_tile = self.tiles
        if query_tile > _SMALLEST[0] and (query_tile >= key_tile or key_tile <= _SMALLEST[1]):
            return self.within(query_tile // 2, key_tile)
        return self.within(query_tile, max(_SMALLEST[1], key_tile // 2))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The shapes of the three kernels."""

    forward: Shape
    d_query: Shape
    d_key: Shape

    def __str__(self) -> str:
        shapes = [getattr(self, name) for name in _KERNELS]
        return "warps x stages " + ", ".join(f"{x.warps}x{x.stages}" for x in shapes)


_KERNELS = ("forward", "d_query", "d_key")
_Shapes = tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class _Row:
    """Shapes for a width of heads, the best for large blocks first."""

    forward: _Shapes
    d_query: _Shapes
    d_key: _Shapes

    def fitted(self, block_mask: BlockMask) -> Tuning:
        """Returns the first shapes that suit the blocks of a mask, or the last, shrunk."""
        return Tuning(
            _fitted(self.forward, block_mask, _ROWS, _COLUMNS),
            _fitted(self.d_query, block_mask, _ROWS, _COLUMNS),
            _fitted(self.d_key, block_mask, _COLUMNS, _ROWS),
        )


# By the least capability of a family: for each width, forward, dQ, and dK with dV.
_HALF = {
    80: {
        64: _Row(
            (Shape(128, 64, 4, 3), Shape(64, 64, 4, 3)),
            (Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(64, 128, 8, 3), Shape(64, 64, 4, 3)),
        ),
        128: _Row(
            (Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(64, 64, 8, 3),),
            (Shape(64, 64, 8, 3),),
        ),
        256: _Row(
            (Shape(128, 32, 8, 3), Shape(64, 32, 8, 3)),
            (Shape(64, 64, 8, 2),),
            (Shape(32, 64, 8, 2),),
        ),
    },
    # 99 KiB of shared memory: GeForce and workstation cards of three generations.
    86: {
        64: _Row(
            (Shape(128, 64, 4, 3), Shape(64, 64, 4, 3)),
            (Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(64, 128, 8, 3), Shape(64, 64, 4, 3)),
        ),
        128: _Row(
            (Shape(128, 32, 8, 3), Shape(64, 32, 4, 3)),
            (Shape(64, 32, 8, 3),),
            (Shape(32, 64, 8, 3),),
        ),
        256: _Row(
            (Shape(64, 32, 8, 2),),
            (Shape(32, 32, 8, 2),),
            (Shape(32, 32, 8, 2),),
        ),
    },
    90: {
        64: _Row(
            (Shape(128, 128, 8, 3), Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(64, 128, 8, 3), Shape(64, 64, 4, 3)),
        ),
        128: _Row(
            (Shape(128, 128, 8, 3), Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(128, 64, 8, 3), Shape(64, 64, 4, 2)),
            (Shape(64, 128, 8, 2), Shape(64, 64, 4, 2)),
        ),
        256: _Row(
            (Shape(128, 64, 8, 2), Shape(64, 64, 4, 2)),
            (Shape(128, 32, 8, 2), Shape(64, 32, 4, 2)),
            (Shape(32, 64, 8, 2),),
        ),
    },
    100: {
        64: _Row(
            (Shape(128, 128, 8, 3), Shape(128, 64, 4, 3), Shape(64, 64, 4, 3)),
            (Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(64, 128, 8, 3), Shape(64, 64, 4, 2)),
        ),
        128: _Row(
            (Shape(128, 128, 8, 3), Shape(128, 64, 8, 3), Shape(64, 64, 4, 3)),
            (Shape(128, 64, 8, 3), Shape(64, 64, 4, 2)),
            (Shape(64, 128, 8, 2), Shape(64, 64, 8, 2)),
        ),
        256: _Row(
            (Shape(128, 64, 8, 2), Shape(64, 64, 4, 2)),
            (Shape(128, 32, 8, 2), Shape(64, 32, 4, 2)),
            (Shape(32, 64, 8, 2),),
        ),
    },
}
# float32 is exact, on the arithmetic units that everything else uses too.
_SINGLE = {
    64: _Row((Shape(64, 32, 8, 2),), (Shape(64, 32, 8, 2),), (Shape(32, 32, 8, 2),)),
    128: _Row((Shape(64, 32, 8, 2),), (Shape(32, 32, 8, 2),), (Shape(32, 32, 8, 2),)),
    256: _Row((Shape(32, 16, 8, 2),), (Shape(32, 16, 8, 2),), (Shape(32, 16, 8, 2),)),
}


def plans(call: Call, target: Target) -> tuple[Plan, ...]:
    """Returns the plans of a call that there are, the default first.

    The others change one kernel at a time, to another shape of its row in the tables or
    to a pipeline of another depth. Not all of these fit every machine.
    """
    block_mask = call.block_mask
    row = _row(call.query.shape[-1], call.query.dtype, target)
    default = choose(block_mask, call.query.shape[-1], call.query.dtype, target)
    found = [default]
    for name in _KERNELS:
        chosen = getattr(default, name)
        deeper = [dataclasses.replace(chosen, stages=n) for n in (2, 3, 4)]
        for shape in (*getattr(row, name), *deeper):
            if _takes(shape, block_mask):
                found.append(dataclasses.replace(default, **{name: shape}))
    return tuple(_plan(call, target, tuning) for tuning in dict.fromkeys(found))


def choose(block_mask: BlockMask, head_dim: int, dtype: np.dtype, target: Target) -> Tuning:
    """Returns the default shapes.

    Tiles are no larger than blocks of a free selection, whose neighbours may have
    nothing in common, and not longer along the keys than those of a rule: stripes stand
    apart there. Along the queries the lists of a rule are alike, and merge at no cost.
    """
    return _row(head_dim, dtype, target).fitted(block_mask)


def _plan(call: Call, target: Target, tuning: Tuning) -> Plan:
    tilings = {name: getattr(tuning, name).tiling(call.block_mask) for name in _KERNELS}
    geometry, scores = call.block_mask.geometry, call.scores
    return Plan(geometry, **tilings, scores=scores, target=target, options=tuning)


def _row(head_dim: int, dtype: np.dtype, target: Target) -> _Row:
    rows = _SINGLE if dtype == np.float32 else _HALF[_family(target.compute_capability or 80)]
    return rows[min(width for width in rows if width >= head_dim)]


def _family(capability: int) -> int:
    if capability in (86, 89) or capability >= 120:
        return 86
    return max(least for least in (80, 90, 100) if least <= capability)


def _fitted(shapes: _Shapes, block_mask: BlockMask, query_least: int, key_least: int) -> Shape:
    geometry = block_mask.geometry
    query_limit, key_limit = shapes[0].tiles
    if geometry.query_blocks > 1 and block_mask.rule is None:
        query_limit = max(query_least, _power_of_two_in(geometry.query_block_size))
    if geometry.key_blocks > 1:
        key_limit = max(key_least, _power_of_two_in(geometry.key_block_size))
    for shape in shapes:
        if shape.within(query_limit, key_limit) == shape and _takes(shape, block_mask):
            return shape
    shape = shapes[-1].within(query_limit, key_limit)
    while not _takes(shape, block_mask) and shape != shape.shrunk():
        shape = shape.shrunk()
    return shape


def _takes(shape: Shape, block_mask: BlockMask) -> bool:
    return kernel_tables.refusal(block_mask, *shape.tiles) is None


def _power_of_two_in(number: int) -> int:
    return 1 << (number.bit_length() - 1)
