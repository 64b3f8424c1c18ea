"""What a warpgroup does with its registers: layouts, loads and matrix products.

The interpreter of Mosaic GPU knows no layouts, and its products are simulated (`products`):
everything else (rings, barriers, lists, masks, waits) runs on a CPU as it stands.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.mosaic_gpu import pieces
from pallas_kernels.block_sparse_attention.mosaic_gpu.products import (
    Factors,
    Hardware,
    Products,
    Simulated,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.rings import SPLIT_COLUMNS
from pallas_kernels.block_sparse_attention.mosaic_gpu.tuning import ROWS

Tile = tuple[Any, ...]
"""References to the pieces of a matrix in shared memory, see `pieces`, or to a float32 one."""

# Layouts of a [ROWS, columns] matrix and of vectors along its rows and its columns.
_MATRIX = plgpu.Layout.WGMMA
_ALONG_ROWS = plgpu.Layout.WGMMA.reduce(1)
_ALONG_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """The operations of a warpgroup, on Hopper or simulated.

    Attributes:
        is_simulated: whether the interpreter of Mosaic GPU runs the kernel.
    """

    is_simulated: bool

    def row_numbers(self) -> Int[Array, "64"]:
        """Returns 0 .. 63 along the rows."""
        return self._cast(lax.iota(jnp.int32, ROWS), _ALONG_ROWS)

    def column_numbers(self, columns: int) -> Int[Array, "C"]:
        """Returns 0 .. columns - 1 along the columns."""
        return self._cast(lax.iota(jnp.int32, columns), _ALONG_COLUMNS)

    def rows_of(self, value: float) -> Float[Array, "64"]:
        """Returns a vector along the rows."""
        return self._cast(jnp.full((ROWS,), value, jnp.float32), _ALONG_ROWS)

    def zeros(self, columns: int) -> Float[Array, "64 C"]:
        """Returns the start of an accumulator."""
        return self._cast(jnp.zeros((ROWS, columns), jnp.float32), _MATRIX)

    def load_rows(self, ref: Any) -> Array:
        """Returns a vector in memory as one along the rows."""
        return self._load(ref, _ALONG_ROWS)

    def load_columns(self, ref: Any) -> Array:
        """Returns a vector in memory as one along the columns."""
        return self._load(ref, _ALONG_COLUMNS)

    def split(self, array: Float[Array, "64 C"], like: Tile) -> tuple[Array, ...]:
        """Returns as many pieces of a matrix in registers, of the same type, as another has."""
        first, *others = like
        found = (array.astype(first.dtype),)
        if not others:
            return found
        # The barrier keeps XLA, in the interpreter, from taking casts there and back out.
        (rounded,) = found = lax.optimization_barrier(found)
        return found + self.split(array - rounded.astype(array.dtype), tuple(others))

    def store(self, array: Float[Array, "64 H"], ref: Any) -> None:
        """Writes a matrix to one in shared memory."""
        ref[...] = array.astype(ref.dtype)

    def product(
        self, left: Tile, right: Tile, meanwhile: Callable[[], None] | None = None
    ) -> Float[Array, "64 C"]:
        """Returns left @ right' of two matrices in shared memory, [64, H] and [C, H].

        The left one may be of float32, and is then split as the right one is.
        meanwhile is called once the product is under way.
        """
        products = self._products()

        def run(accumulator: Any) -> Array:
            self._multiply_rows(products, accumulator, left, right)
            if meanwhile is not None:
                meanwhile()
            return products.read(accumulator)

        return products.from_zero(run, _columns(right))

    def products(
        self,
        first: tuple[Tile, Tile],
        second: tuple[Tile, Tile],
        between: Callable[[Float[Array, "64 C"]], Any],
    ) -> tuple[Any, Float[Array, "64 C"]]:
        """Returns (between(product of first), product of second).

        The second product runs while `between` works on the first.
        """
        products = self._products()

        def run(one: Any, other: Any) -> tuple[Any, Array]:
            for accumulator, (left, right) in ((one, first), (other, second)):
                self._multiply_rows(products, accumulator, left, right)
            under_way = len(pieces.pairs(second[1], second[1]))
            result = between(products.read(one, under_way))
            return result, products.read(other)

        return products.from_zero(run, _columns(first[1]), _columns(second[1]))

    def accumulate(
        self, total: Float[Array, "64 H"], left: tuple[Array, ...], right: Tile
    ) -> Float[Array, "64 H"]:
        """Returns total + left @ right, left in registers and right in shared memory."""
        products = self._products()

        def run(accumulator: Any) -> None:
            products.start(accumulator, Factors(left, right, True, False))

        (total,) = products.onto(run, total)
        return total

    def accumulate_beside(
        self,
        total: Float[Array, "64 H"],
        left: tuple[Array, ...],
        right: Tile,
        other: tuple[Tile, Tile],
    ) -> tuple[Float[Array, "64 H"], Float[Array, "64 C"]]:
        """Returns (`accumulate`, `product` of other), waiting once for both."""
        products = self._products()

        def run(one: Any, beside: Any) -> None:
            products.start(one, Factors(left, right, True, False))
            self._multiply_rows(products, beside, *other)

        one, beside = products.onto(run, total, self.zeros(_columns(other[1])))
        return one, beside

    def _products(self) -> Products:
        return Simulated() if self.is_simulated else Hardware()

    def _multiply_rows(self, products: Products, accumulator: Any, left: Tile, right: Tile) -> None:
        """Starts accumulator += left @ right' of `product`."""
        if not _is_whole(left):
            products.start(accumulator, Factors(left, right, False, True))
            return
        for first in range(0, left[0].shape[1], SPLIT_COLUMNS):
            columns = pl.ds(first, SPLIT_COLUMNS)
            if first:
                products.wait()  # The registers of the last columns are free for these.
            part = self._load(left[0].at[:, columns], _MATRIX, is_optimized=True)
            others = tuple(ref.at[:, columns] for ref in right)
            products.start(accumulator, Factors(self.split(part, right), others, True, True))

    def _load(self, ref: Any, layout: Any, is_optimized: bool = False) -> Array:
        if self.is_simulated:
            return ref[...]
        # Loads from global memory are never of the kind that Mosaic calls optimized.
        return plgpu.load(ref, (), layout=layout, optimized=is_optimized)

    def _cast(self, array: Array, layout: Any) -> Array:
        return array if self.is_simulated else plgpu.layout_cast(array, layout)


def _is_whole(tile: Tile) -> bool:
    """Returns whether a matrix of float32 is not in pieces."""
    return tile[0].dtype == jnp.float32


def _columns(right: Tile) -> int:
    """Returns the columns of a product with right'."""
    return int(right[0].shape[0])


def along_rows(vector: Array, columns: int) -> Array:
    """Repeats a vector along the rows for every column."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))


def along_columns(vector: Array, rows: int) -> Array:
    """Repeats a vector along the columns for every row."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), (1,))
