"""What the kernels share: reading the lists, the roles of warpgroups, the launch."""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_sparse_attention.differentiable import Tables
from pallas_kernels.kernel_tables import Lists
from pallas_kernels.targets import Target

_Number = Int[Array, ""]
_State = TypeVar("_State")

# Registers per thread, in steps of 8: the three warpgroups together have 512.
_COMPUTE_REGISTERS = 240
_PRODUCER_REGISTERS = 24
WARPGROUP_AXIS = "warpgroup"
_GRID_AXIS = "block"


class Place(NamedTuple):
    """What a block of the grid computes."""

    batch: _Number
    head: _Number
    tile: _Number


class Mask(NamedTuple):
    """References to what says which pairs are visible.

    Attributes:
        lists: entries of each tile of one side.
        query_offset: [1] or [B].
        query_segments: [B, T], or None.
        key_segments: [B, S], or None.
    """

    lists: Lists
    query_offset: Any
    query_segments: Any
    key_segments: Any


@dataclasses.dataclass(frozen=True)
class Entries:
    """The list of one tile, in global memory.

    Attributes:
        lists: references to all lists.
        place: (batch, pattern head, tile) of this one.
    """

    lists: Lists
    place: tuple[_Number, _Number, _Number]

    @staticmethod
    def of(lists: Lists, batch: _Number, head: _Number, heads: int, tile: _Number) -> "Entries":
        """Returns the list that a head uses; a batch of one serves every batch."""
        batches, patterns, _ = lists.counts.shape
        batch = batch if batches > 1 else jnp.int32(0)
        pattern = lax.div(head * patterns, jnp.int32(heads))
        return Entries(lists, (batch, pattern, tile))

    @property
    def count(self) -> _Number:
        """The number of entries."""
        return self.lists.counts[self.place]

    def tile(self, number: _Number) -> _Number:
        """Returns the tile of an entry; beyond the count, of the last."""
        return self.lists.tiles[*self.place, self._clipped(number)]

    def bits(self, number: _Number) -> _Number:
        """Returns the bits of an entry; beyond the count, of the last."""
        return self.lists.bits[*self.place, self._clipped(number)]

    def _clipped(self, number: _Number) -> _Number:
        return jnp.minimum(number, self.lists.tiles.shape[-1] - 1)


def walk(
    entries: Entries,
    number: _Number,
    state: _State,
    sees_some: Callable[[_Number, _Number], Bool[Array, ""]],
    attend: Callable[[_Number, _Number, _Number, _State], _State],
    skip: Callable[[_Number, _State], _State],
) -> tuple[_State, _Number]:
    """Folds a list into the state of a compute warpgroup.

    Args:
        entries: the list.
        number: of the first step, counted over all lists of the kernel.
        state: a tree of arrays in registers.
        sees_some: whether the warpgroup has anything to do, from (bits, tile).
        attend: the state after an entry, from (number, tile, bits, state).
        skip: the same where there is nothing to do, from (number, state).

    Returns:
        the state, and the number of the step after the last.
    """

    def body(entry: _Number, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, tile, bits = carry
        # Asked for a step ahead: nobody waits for global memory.
        following = (entries.tile(entry + 1), entries.bits(entry + 1))
        state = lax.cond(
            sees_some(bits, tile),
            lambda state: attend(number + entry, tile, bits, state),
            lambda state: skip(number + entry, state),
            state,
        )
        return (state, *following)

    count, first = entries.count, jnp.int32(0)
    carry = (state, entries.tile(first), entries.bits(first))
    state, _, _ = lax.fori_loop(0, count, body, carry)
    return state, number + count


def stream(entries: Entries, number: _Number, copy: Callable[[_Number, _Number], None]) -> _Number:
    """Calls copy(number, tile) for each entry of a list, in the producer.

    number is that of the first step; returns that of the step after the last.
    """

    def body(entry: _Number, tile: _Number) -> _Number:
        following = entries.tile(entry + 1)
        copy(number + entry, tile)
        return following

    count = entries.count
    lax.fori_loop(0, count, body, entries.tile(jnp.int32(0)))
    return number + count


@dataclasses.dataclass(frozen=True)
class Turns:
    """Lets two warpgroups alternate: one multiplies while the other does its softmax.

    Attributes:
        barrier: passed when both have arrived; None when nobody waits.
        index: of this warpgroup.
    """

    barrier: Any
    index: _Number

    def begin(self) -> None:
        """Lets the second warpgroup start half a step later."""
        if self.barrier is not None:
            pl.when(self.index == 1)(self.swap)

    def end(self) -> None:
        """Makes up for `begin`."""
        if self.barrier is not None:
            pl.when(self.index == 0)(self.swap)

    def swap(self) -> None:
        """Arrives and waits for the other."""
        self.arrive()
        self.wait()

    def arrive(self) -> None:
        """Tells the other that it may go on."""
        if self.barrier is not None:
            plgpu.barrier_arrive(self.barrier)

    def wait(self) -> None:
        """Waits until the other has arrived as often."""
        if self.barrier is not None:
            plgpu.barrier_wait(self.barrier)


def head_and_part(first_head: _Number, index: _Number, parts: int) -> tuple[_Number, _Number]:
    """Returns a warpgroup's query head, and which 64 rows of the tile it has."""
    size = jnp.int32(parts)
    return first_head + lax.div(index, size), lax.rem(index, size)


def entry_of_batch(ref: Any, batch: _Number) -> _Number:
    """Returns the entry of a [1] or [B] reference."""
    return ref[batch if ref.shape[0] > 1 else jnp.int32(0)]


def launch(
    body: Callable[..., None],
    arrays: tuple[Array, ...],
    lists: Lists,
    tables: Tables,
    **options: Any,
) -> tuple[Array, ...]:
    """Runs body(place, arrays, mask, outputs, *scratch); see `start`."""
    segments = (None, None) if tables.segments is None else tables.segments
    mask = Mask(lists, tables.query_offset, *segments)
    return start(body, (arrays, mask), **options)


def start(
    body: Callable[..., None],
    operands: tuple[Any, ...],
    *,
    target: Target,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    scratch: Any,
    grid: tuple[int, int, int],
    compute_warpgroups: int,
    has_barriers: bool = False,
) -> tuple[Array, ...]:
    """Runs body(place, *operands, outputs, *scratch) on a grid [batch, head, tile].

    The tile is what changes fastest: tiles of one head run together and share the other
    side in the cache. The grid has one axis, as CUDA's others end at 65535. Operands are
    trees of arrays; the body gets trees of references. Every store has barriers around
    it, unless the body has what barriers it needs.
    """
    arrays, structure = jax.tree.flatten(operands)

    def kernel(*refs: Any) -> None:
        given, rest = refs[: len(arrays)], refs[len(arrays) :]
        given = jax.tree.unflatten(structure, given)
        body(_place(grid), *given, rest[: len(outputs)], *rest[len(outputs) :])

    results = plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=(math.prod(grid),),
        grid_names=(_GRID_AXIS,),
        num_threads=compute_warpgroups + 1,
        thread_name=WARPGROUP_AXIS,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Rows are reduced within a warp.
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=has_barriers,
        ),
        interpret=interpreter() if target.interpret is True else target.interpret,
    )(*arrays)
    return tuple(results)


def _place(grid: tuple[int, int, int]) -> Place:
    _, heads, tiles = (jnp.int32(size) for size in grid)
    number = lax.axis_index(_GRID_AXIS)
    row = lax.div(number, tiles)
    return Place(lax.div(row, heads), lax.rem(row, heads), lax.rem(number, tiles))


def interpreter() -> Any:
    """Returns the parameters of the interpreter of Mosaic GPU."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    # Not public before JAX 0.11.
    params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return params.InterpretGPUParams()


def by_role(
    compute: Callable[[_Number], None],
    produce: Callable[[], None],
    compute_warpgroups: int,
) -> None:
    """Lets the first warpgroups compute, with most registers, and the last copy."""
    index = lax.axis_index(WARPGROUP_AXIS)

    def run_compute() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(index)

    def run_produce() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce()

    lax.cond(index < compute_warpgroups, run_compute, run_produce)
