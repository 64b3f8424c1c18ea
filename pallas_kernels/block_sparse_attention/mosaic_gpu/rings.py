"""Rings of tiles in shared memory, filled by TMA and read by the compute warpgroups."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

Step = Int[Array, ""]

SPLIT_COLUMNS = 32
"""Columns of a float32 matrix that are split into pieces at once."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Tiles on their way from global memory, in the order of their steps.

    Attributes:
        buffer: [stages, pieces, *tile] in shared memory.
        ready: one barrier per stage, passed when its tile has arrived.
        free: one barrier per stage, passed when all warpgroups have read its tile.
    """

    buffer: Any
    ready: Any
    free: Any

    @staticmethod
    def scratch(
        stages: int, shape: tuple[int, int, int], dtype: Any, readers: int
    ) -> tuple[Any, Any, Any]:
        """Returns the scratch types of a ring, its fields in order.

        float32 is for vectors; tiles of any other type are laid out for WGMMA.
        """
        whole = (stages, *shape)
        is_vector = dtype == jnp.float32
        return (
            plgpu.SMEM(whole, dtype) if is_vector else tile_scratch(whole, dtype, shape[0]),
            plgpu.Barrier(num_barriers=stages, num_arrivals=shape[0]),
            plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
        )

    def fill(self, step: Step, sources: tuple[Any, ...]) -> None:
        """Starts the copy of a tile's pieces once its stage is free; for the producer."""
        slot = self._slot(step)
        pl.when(step >= self.buffer.shape[0])(functools.partial(self._wait_free, step))
        load(sources, pieces_of(self.buffer, slot), self.ready.at[slot])

    def drain(self, steps: Step) -> None:
        """Waits until all tiles have been read; for the producer, after the last step."""
        for stage in range(self.buffer.shape[0]):
            step = steps - 1 - stage
            pl.when(step >= 0)(functools.partial(self._wait_free, step))

    def wait(self, step: Step) -> tuple[Any, ...]:
        """Returns the pieces of the tile of a step once they have arrived."""
        slot = self._slot(step)
        plgpu.barrier_wait(self.ready.at[slot])
        return pieces_of(self.buffer, slot)

    def release(self, step: Step) -> None:
        """Tells that this warpgroup has read the tile of a step."""
        plgpu.barrier_arrive(self.free.at[self._slot(step)])

    def _wait_free(self, step: Step) -> None:
        plgpu.barrier_wait(self.free.at[self._slot(step)])

    def _slot(self, step: Step) -> Step:
        return lax.rem(step, lax.full_like(step, self.buffer.shape[0]))


def tile_scratch(shape: tuple[int, ...], dtype: Any, pieces: int) -> Any:
    """Returns shared memory for tiles [*count, rows, H] as WGMMA and TMA want them.

    A swizzled row is as wide as what a product takes at once: 64 columns, or where a matrix
    has several pieces, those `SPLIT_COLUMNS` of it that are in registers with their pieces.
    """
    columns = 64 if pieces == 1 else SPLIT_COLUMNS
    swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle))


def pieces_of(buffer: Any, index: Step) -> tuple[Any, ...]:
    """Returns references to the pieces of one tile of a buffer [count, pieces, *tile]."""
    return tuple(buffer.at[index, piece] for piece in range(buffer.shape[1]))


def load(sources: tuple[Any, ...], targets: tuple[Any, ...], barrier: Any) -> None:
    """Starts the copy of every piece from global to shared memory."""
    for source, target in zip(sources, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, barrier)
