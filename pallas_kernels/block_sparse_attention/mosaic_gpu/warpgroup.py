"""What a warpgroup does with its registers: layouts, loads and matrix products.

The interpreter of Mosaic GPU knows no layouts and no accumulators in registers. There
the same functions load the operands and multiply them in plain JAX, so that everything
around the products (rings, barriers, lists, masks) runs on a CPU as it stands.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

ROWS = 64
"""Rows of a product that one warpgroup computes."""

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

    def product(
        self, left: Any, right: Any, meanwhile: Callable[[], None] | None = None
    ) -> Float[Array, "64 C"]:
        """Returns left @ right' of two arrays in shared memory, [64, H] and [C, H].

        meanwhile is called once the product is under way.
        """
        if self.is_simulated:
            if meanwhile is not None:
                meanwhile()
            return _dot(left[...], right[...].T)

        def run(accumulator: Any) -> Array:
            plgpu.wgmma(accumulator, left, plgpu.transpose_ref(right, (1, 0)))
            if meanwhile is not None:
                meanwhile()
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((ROWS, right.shape[0]), jnp.float32))

    def products(
        self,
        first: tuple[Any, Any],
        second: tuple[Any, Any],
        between: Callable[[Float[Array, "64 C"]], Any],
    ) -> tuple[Any, Float[Array, "64 C"]]:
        """Returns (between(product of first), product of second).

        The second product runs while `between` works on the first.
        """
        if self.is_simulated:
            return between(self.product(*first)), self.product(*second)

        def run(one: Any, other: Any) -> tuple[Any, Array]:
            for accumulator, (left, right) in ((one, first), (other, second)):
                plgpu.wgmma(accumulator, left, plgpu.transpose_ref(right, (1, 0)))
            result = between(plgpu.wgmma_accumulator_load(one, wait_n=1))
            return result, other[...]

        accumulators = (
            plgpu.ACC((ROWS, right.shape[0]), jnp.float32) for _, right in (first, second)
        )
        return pl.run_scoped(run, *accumulators)

    def accumulate(
        self, total: Float[Array, "64 H"], left: Float[Array, "64 C"], right: Any
    ) -> Float[Array, "64 H"]:
        """Returns total + left @ right, left in registers and right in shared memory."""
        if self.is_simulated:
            return total + _dot(left, right[...])
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, left, right))(
            plgpu.ACC.init(total)
        )

    def accumulate_beside(
        self,
        total: Float[Array, "64 H"],
        left: Float[Array, "64 C"],
        right: Any,
        other: tuple[Any, Any],
    ) -> tuple[Float[Array, "64 H"], Float[Array, "64 C"]]:
        """Returns (`accumulate`, `product` of other), waiting once for both."""
        if self.is_simulated:
            return self.accumulate(total, left, right), self.product(*other)

        def run(accumulators: tuple[Any, Any]) -> None:
            plgpu.wgmma(accumulators[0], left, right)
            plgpu.wgmma(accumulators[1], other[0], plgpu.transpose_ref(other[1], (1, 0)))

        zeros = self.zeros(other[1].shape[0])
        return pl.run_state(run)((plgpu.ACC.init(total), plgpu.ACC.init(zeros)))

    def _load(self, ref: Any, layout: Any) -> Array:
        if self.is_simulated:
            return ref[...]
        # Loads from global memory are never of the kind that Mosaic calls optimized.
        return plgpu.load(ref, (), layout=layout, optimized=False)

    def _cast(self, array: Array, layout: Any) -> Array:
        return array if self.is_simulated else plgpu.layout_cast(array, layout)


def _dot(left: Array, right: Array) -> Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32, precision="highest")


def along_rows(vector: Array, columns: int) -> Array:
    """Repeats a vector along the rows for every column."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))


def along_columns(vector: Array, rows: int) -> Array:
    """Repeats a vector along the columns for every row."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), (1,))
