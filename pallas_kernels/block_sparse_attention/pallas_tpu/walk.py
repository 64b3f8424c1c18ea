"""A kernel call over flat lists: its grid, where each step reads, and the chunks."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Shaped

from pallas_kernels.block_sparse_attention.pallas_tpu import flat
from pallas_kernels.block_sparse_attention.pallas_tpu.flat import Chunk, Lists, Visits
from pallas_kernels.block_sparse_attention.pallas_tpu.operands import Operand
from pallas_kernels.targets import Target

# More than the default of 16 MiB, and below the 64 MiB of the smallest core.
_VMEM_BYTES = 56 * 2**20

_Scalar = Int[Array, ""]
_Tiled = Shaped[Array, "..."]


class Scalars(NamedTuple):
    """What lies in SMEM: batch entry, head and row where the chunk starts, and lists."""

    start: Any
    words: Any
    bits: Any
    query_offset: Any


class Here(NamedTuple):
    """Where a step of the grid is, all traced scalars.

    Attributes:
        batch: entry of the batch.
        head: head of the row.
        row: number of the tile that results are computed for.
        other_head: head of the tile that it meets.
        tile: number of the tile that it meets.
        out: batch entry, head and row, counted from the start of the chunk.
        bits: which granules of the tile are visible.
        is_first: whether the row has just begun.
        is_last: whether the row ends here.
        is_active: whether there is a tile at all.
        query_offset: position of the first query.
    """

    batch: Any
    head: Any
    row: Any
    other_head: Any
    tile: Any
    out: tuple[Any, Any, Any]
    bits: Any
    is_first: Any
    is_last: Any
    is_active: Any
    query_offset: Any

    def visit(self, body: Callable[[bool], None]) -> None:
        """Calls body(is_masked) if there is a tile; a full tile needs no mask."""
        is_full = self.bits == 0
        pl.when(self.is_active & is_full)(lambda: body(False))
        pl.when(self.is_active & ~is_full)(lambda: body(True))


@dataclasses.dataclass(frozen=True)
class Walk:
    """Rows of tiles on one side of attention, each meeting the tiles on its list.

    Out and dQ come from rows of queries that meet keys, dK and dV from rows of keys
    that meet the queries of all heads of their group, which add up in VMEM.

    Attributes:
        name: of the kernel, for profiles.
        target: the machine.
        batch: B.
        heads: heads of the rows: N, or K if rows are keys.
        group: N / K.
        rows_are: what the rows are.
        tiles: number of tiles on the other side.
        repeats: heads that each visit stands for: the group, if its heads share a list.
    """

    name: str
    target: Target
    batch: int
    heads: int
    group: int
    rows_are: Literal["queries", "keys"]
    tiles: int
    repeats: int = 1

    @property
    def member_shift(self) -> int:
        """Bits of a tile number; above them stands the number of the head in its group."""
        return (self.tiles - 1).bit_length()

    def run(
        self,
        kernel: Callable[..., None],
        lists: Lists,
        query_offset: Int[Array, "b"],
        inputs: Sequence[Operand],
        outputs: Sequence[jax.ShapeDtypeStruct],
        scratch: Sequence[Any],
    ) -> tuple[_Tiled, ...]:
        """Returns the outputs, [B, heads, rows of the lists, *shape] for each shape.

        Args:
            kernel: takes `Here` and the refs of inputs, outputs and scratch.
            lists: what each row meets.
            query_offset: position of the first query, one or of each batch entry.
            inputs: what is read.
            outputs: shapes of the outputs of one row.
            scratch: float32 shapes in VMEM that live throughout the walk.
        """
        chunk = Chunk.of(lists)
        sizes = dataclasses.astuple(chunk)
        whole = lists.counts.shape[:3]
        numbers = tuple(-(-n // size) for n, size in zip(whole, sizes, strict=True))

        def walk_chunk(number: _Scalar) -> tuple[_Tiled, ...]:
            place = jnp.unravel_index(number, numbers)
            # The last chunk of rows overlaps the one before: all have one shape.
            start = [
                jnp.minimum(i * size, n - size).astype(jnp.int32)
                for i, size, n in zip(place, sizes, whole, strict=True)
            ]
            part = jax.tree.map(lambda table: _slice(table, start, sizes), lists)
            visits = flat.flatten(part, self.member_shift)
            stage = _Stage(self, chunk, whole[0] > 1, self.heads // whole[1], visits.words.size)
            start[1] *= stage.heads_per_pattern
            scalars = Scalars(jnp.stack(start), visits.words, visits.bits, query_offset)
            call = stage.pallas_call(kernel, visits, scalars, inputs, outputs, scratch)
            return tuple(call(*scalars, *(operand.array for operand in inputs)))

        if math.prod(numbers) == 1:
            return walk_chunk(jnp.int32(0))
        results = lax.map(walk_chunk, jnp.arange(math.prod(numbers), dtype=jnp.int32))
        return tuple(_assemble(x, numbers, whole[2]) for x in results)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A walk over one chunk, with what its index arithmetic needs."""

    walk: Walk
    chunk: Chunk
    lists_have_batch: bool
    heads_per_pattern: int
    visits: int

    @property
    def outer(self) -> tuple[int, int]:
        """Batch entries and heads of the chunk, the parallel axes of the grid."""
        batches = self.chunk.batches if self.lists_have_batch else self.walk.batch
        return batches, self.chunk.patterns * self.heads_per_pattern

    def pallas_call(
        self,
        kernel: Callable[..., None],
        visits: Visits,
        scalars: Scalars,
        inputs: Sequence[Operand],
        outputs: Sequence[jax.ShapeDtypeStruct],
        scratch: Sequence[Any],
    ) -> Callable[..., Any]:
        def body(*refs: Any) -> None:
            ids = [pl.program_id(axis) for axis in range(4)]
            kernel(self.locate(*ids, *refs[: len(scalars)]), *refs[len(scalars) :])

        rows = (*self.outer, self.chunk.rows)
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(*self.outer, visits.most, self.walk.repeats),
                in_specs=[self._read(operand) for operand in inputs],
                out_specs=[self._write(shape.shape) for shape in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct((*rows, *x.shape), x.dtype) for x in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=_VMEM_BYTES,
            ),
            interpret=self.walk.target.interpret,
            name=self.walk.name,
        )

    def locate(self, batch: Any, head: Any, step: Any, repeat: Any, *refs: Any) -> Here:
        """Returns where a step is; refs are those of `Scalars`."""
        scalars, walk = Scalars(*refs), self.walk
        pattern = divided(head, self.heads_per_pattern)
        if self.lists_have_batch:
            pattern += batch * self.chunk.patterns
        visit = pattern * (self.visits // self._patterns) + step
        word = scalars.words[visit]
        number = lax.shift_right_logical(word, np.int32(flat.FLAG_BITS))
        number &= (1 << flat.TILE_BITS) - 1
        row = lax.shift_right_logical(word, np.int32(flat.TILE_BITS + flat.FLAG_BITS))
        out = (batch, head, row)
        batch, head, row = (x + scalars.start[axis] for axis, x in enumerate(out))
        if walk.rows_are == "queries":
            other_head = divided(head, walk.group)
        else:
            member = lax.shift_right_logical(number, np.int32(walk.member_shift))
            other_head = head * walk.group + member + repeat
        offset_entry = batch if scalars.query_offset.shape[0] > 1 else 0
        return Here(
            batch=batch,
            head=head,
            row=row,
            other_head=other_head,
            tile=number & ((1 << walk.member_shift) - 1),
            out=out,
            bits=scalars.bits[visit],
            is_first=((word & flat.IS_FIRST) != 0) & (repeat == 0),
            is_last=((word & flat.IS_LAST) != 0) & (repeat == walk.repeats - 1),
            is_active=(word & flat.IS_ACTIVE) != 0,
            query_offset=scalars.query_offset[offset_entry],
        )

    @property
    def _patterns(self) -> int:
        return self.chunk.patterns * (self.chunk.batches if self.lists_have_batch else 1)

    def _read(self, operand: Operand) -> pl.BlockSpec:
        def index(*arguments: Any) -> tuple[Any, ...]:
            here = self.locate(*arguments)
            is_row = operand.side == "rows"
            head = (here.head if is_row else here.other_head,) * (operand.array.ndim - 4)
            return (here.batch, *head, here.row if is_row else here.tile, 0, 0)

        return _block(operand.array.shape, index)

    def _write(self, tile: tuple[int, ...]) -> pl.BlockSpec:
        def index(*arguments: Any) -> tuple[Any, ...]:
            return (*self.locate(*arguments).out, 0, 0)

        return _block((*self.outer, self.chunk.rows, *tile), index)


def divided(number: Any, divisor: int) -> Any:
    """Returns number // divisor; Python's operator asks which TPU it is lowered for."""
    if divisor & (divisor - 1) == 0:
        return lax.shift_right_logical(number, np.int32(divisor.bit_length() - 1))
    return lax.div(number, np.int32(divisor))


def _block(shape: tuple[int, ...], index: Callable[..., Any]) -> pl.BlockSpec:
    return pl.BlockSpec((*[None] * (len(shape) - 2), *shape[-2:]), index)


def _slice(table: _Tiled, start: list[_Scalar], sizes: tuple[int, ...]) -> _Tiled:
    beyond = table.shape[len(sizes) :]
    return lax.dynamic_slice(table, (*start, *[0] * len(beyond)), (*sizes, *beyond))


def _assemble(chunks: _Tiled, numbers: tuple[int, ...], rows: int) -> _Tiled:
    """Puts [chunks, batch, heads, rows, ...] of all chunks together."""
    chunks = chunks.reshape(*numbers, *chunks.shape[1:])
    chunks = chunks.transpose(0, 3, 1, 4, 2, 5, *range(6, chunks.ndim))
    batches, batch, patterns, heads, parts, size, *tile = chunks.shape
    chunks = chunks.reshape(batches * batch, patterns * heads, parts, size, *tile)
    before = chunks[:, :, :-1].reshape(*chunks.shape[:2], -1, *tile)
    return jnp.concatenate([before, chunks[:, :, -1, parts * size - rows :]], axis=2)
