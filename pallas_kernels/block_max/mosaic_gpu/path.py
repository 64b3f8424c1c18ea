"""The order of the steps of a block of the grid, the same for all of its warpgroups."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_max.mosaic_gpu.plan import Plan
from pallas_kernels.block_max.mosaic_gpu.sight import Sight
from pallas_kernels.block_sparse_attention.mosaic_gpu.kernels import entry_of_batch

_Number = Int[Array, ""]
_State = TypeVar("_State")


@dataclasses.dataclass(frozen=True)
class Path:
    """Row by row the query tiles of each head that see a key tile.

    A row is what a query tile, or the tiles of a block larger than one, add to the result.

    Attributes:
        plan: the static facts.
        sight: the numbers of the key tile.
    """

    plan: Plan
    sight: Sight

    @staticmethod
    def of(plan: Plan, sight: Sight, batch: _Number, tile: _Number) -> "Path":
        """Returns the path past a key tile, from references to the numbers of all."""
        return Path(plan, Sight(*(entry_of_batch(ref.at[:, tile], batch) for ref in sight)))

    @property
    def rows(self) -> tuple[_Number, _Number]:
        """The first row and the one behind the last."""
        tiles = self.plan.queries.tiles_in_block
        start, stop = self.sight.start, self.sight.stop + (tiles - 1)
        return lax.div(start, jnp.int32(tiles)), lax.div(stop, jnp.int32(tiles))

    def over_rows(self, visit: Callable[[_Number, _Number], None]) -> _Number:
        """Calls visit(row, number of its first step) in order; returns how many steps there are."""

        def body(row: _Number, number: _Number) -> _Number:
            visit(row, number)
            _, count = self._tiles(row)
            return number + count * self.plan.heads

        return lax.fori_loop(*self.rows, body, jnp.int32(0))

    def over_steps(
        self,
        row: _Number,
        number: _Number,
        state: _State,
        visit: Callable[[_Number, _Number, _Number, _State], _State],
    ) -> _State:
        """Folds the steps of a row: visit(number, query tile, which head, state) is the next state.

        number is that of the first step.
        """
        first, count = self._tiles(row)

        def over_tiles(head: _Number, state: _State) -> _State:
            start = number + head * count
            return lax.fori_loop(
                0, count, lambda n, state: visit(start + n, first + n, head, state), state
            )

        return lax.fori_loop(0, self.plan.heads, over_tiles, state)

    def is_full(self, tile: _Number) -> Bool[Array, ""]:
        """Returns whether a query tile sees every key."""
        return (self.sight.full_start <= tile) & (tile < self.sight.full_stop)

    def _tiles(self, row: _Number) -> tuple[_Number, _Number]:
        """Returns the first query tile of a row and how many there are."""
        tiles = self.plan.queries.tiles_in_block
        first = jnp.maximum(row * tiles, self.sight.start)
        return first, jnp.minimum((row + 1) * tiles, self.sight.stop) - first
