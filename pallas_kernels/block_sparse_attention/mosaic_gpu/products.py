"""Matrix products that are under way while a warpgroup does something else.

WGMMA reads shared memory at any time until it is waited for. The interpreter of Mosaic GPU
multiplies at once; there `Simulated` stands for `Hardware`, and reads as late as WGMMA may:
what is overwritten before the wait is a race that the interpreter tells of, and what is read
without a wait is NaN.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.mosaic_gpu import pieces
from pallas_kernels.block_sparse_attention.mosaic_gpu.tuning import ROWS


@dataclasses.dataclass(frozen=True)
class Factors:
    """What a product multiplies, left @ right or left @ right'.

    Attributes:
        left: pieces of a matrix, in registers or in shared memory.
        right: pieces of another, in shared memory.
        is_loaded: whether left is in registers.
        is_transposed: whether it is right' that is multiplied.
    """

    left: tuple[Any, ...]
    right: tuple[Any, ...]
    is_loaded: bool
    is_transposed: bool

    @property
    def count(self) -> int:
        """Instructions, one for each pair of pieces."""
        return len(pieces.pairs(self.left, self.right))


@runtime_checkable
class Products(Protocol):
    """The accumulators of a warpgroup and the products under way to them, in order."""

    def from_zero(self, run: Callable[..., Any], *columns: int) -> Any:
        """Returns run(*accumulators) with accumulators [64, columns] of zeros."""

    def onto(self, run: Callable[..., None], *totals: Array) -> tuple[Array, ...]:
        """Returns the accumulators after run(*accumulators), having waited for all products."""

    def start(self, accumulator: Any, factors: Factors) -> None:
        """Starts accumulator += product."""

    def wait(self, under_way: int = 0) -> None:
        """Waits until no more instructions are under way."""

    def read(self, accumulator: Any, under_way: int = 0) -> Float[Array, "64 C"]:
        """Returns an accumulator after `wait`."""


class Hardware:
    """WGMMA."""

    def from_zero(self, run: Callable[..., Any], *columns: int) -> Any:
        """See `Products`."""
        return pl.run_scoped(run, *(plgpu.ACC((ROWS, count), jnp.float32) for count in columns))

    def onto(self, run: Callable[..., None], *totals: Array) -> tuple[Array, ...]:
        """See `Products`."""
        starts = tuple(plgpu.ACC.init(total) for total in totals)
        return tuple(pl.run_state(lambda accumulators: run(*accumulators))(starts))

    def start(self, accumulator: Any, factors: Factors) -> None:
        """See `Products`."""
        right = factors.right
        if factors.is_transposed:
            right = tuple(plgpu.transpose_ref(ref, (1, 0)) for ref in right)
        for x, y in pieces.pairs(factors.left, right):
            plgpu.wgmma(accumulator, x, y)

    def wait(self, under_way: int = 0) -> None:
        """See `Products`."""
        plgpu.wgmma_wait(under_way)

    def read(self, accumulator: Any, under_way: int = 0) -> Float[Array, "64 C"]:
        """See `Products`."""
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=under_way)


@dataclasses.dataclass
class _Accumulator:
    """The sum of the products that were waited for."""

    total: Array


class Simulated:
    """What stands for WGMMA in the interpreter."""

    def __init__(self) -> None:
        """Starts with nothing under way."""
        self._under_way: list[tuple[_Accumulator, Factors]] = []

    def from_zero(self, run: Callable[..., Any], *columns: int) -> Any:
        """See `Products`."""
        return run(*(_Accumulator(jnp.zeros((ROWS, count), jnp.float32)) for count in columns))

    def onto(self, run: Callable[..., None], *totals: Array) -> tuple[Array, ...]:
        """See `Products`."""
        accumulators = tuple(_Accumulator(total) for total in totals)
        run(*accumulators)
        self.wait()
        return tuple(accumulator.total for accumulator in accumulators)

    def start(self, accumulator: _Accumulator, factors: Factors) -> None:
        """See `Products`."""
        self._under_way.append((accumulator, factors))

    def wait(self, under_way: int = 0) -> None:
        """See `Products`."""
        while sum(factors.count for _, factors in self._under_way) > under_way:
            accumulator, factors = self._under_way.pop(0)
            accumulator.total = accumulator.total + _multiplied(factors)

    def read(self, accumulator: _Accumulator, under_way: int = 0) -> Float[Array, "64 C"]:
        """See `Products`."""
        self.wait(under_way)
        if any(target is accumulator for target, _ in self._under_way):
            return jnp.full_like(accumulator.total, jnp.nan)
        return accumulator.total


def _multiplied(factors: Factors) -> Float[Array, "64 C"]:
    left = factors.left if factors.is_loaded else tuple(ref[...] for ref in factors.left)
    right = tuple(ref[...] for ref in factors.right)
    plgpu.commit_smem()  # WGMMA reads in the order of TMA, loads do not.
    found = [
        jnp.dot(
            x,
            y.T if factors.is_transposed else y,
            preferred_element_type=jnp.float32,
            precision="highest",
        )
        for x, y in pieces.pairs(left, right)
    ]
    return jnp.stack(found).sum(axis=0)
