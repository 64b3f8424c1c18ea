"""Which query tiles see a key tile: the ones that the kernel streams past it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_max.axis import Axis
from pallas_kernels.block_max.mosaic_gpu.plan import Plan
from pallas_kernels.kernel_tables import Segments, Tiling, segment_tiles


class Sight(NamedTuple):
    """Numbers of query tiles for each key tile, b = 1 or B.

    Attributes:
        start: the first that sees some of the keys.
        stop: the one behind the last.
        full_start: the first with no hidden pair.
        full_stop: the next one with hidden pairs.
    """

    start: Int[Array, "b J"]
    stop: Int[Array, "b J"]
    full_start: Int[Array, "b J"]
    full_stop: Int[Array, "b J"]

    @classmethod
    def of(cls, plan: Plan, offset: Int[Array, ""], segments: Segments | None) -> "Sight":
        """Returns what the limits show, and the segments: those of the padded sequences."""
        query, key = _ends(plan.queries), _ends(plan.keys)
        seen = plan.geometry.spans(*(offset + x for x in query), *(x[:, None] for x in key))
        some, every = (jnp.asarray(x)[None] for x in seen)
        if segments is not None:
            sizes = (plan.queries.tile, plan.keys.tile)
            may_meet, are_one = (
                x[:, 0].swapaxes(1, 2) for x in segment_tiles(segments, Tiling(*sizes, *sizes))
            )
            some, every = some & may_meet, every & are_one
        start, full_start = _first(some), _first(every)
        stop = jnp.where(some.any(-1), some.shape[-1] - _first(some[..., ::-1]), start)
        hides = ~every & (np.arange(every.shape[-1]) >= full_start[..., None])
        return cls(start, stop, full_start, _first(hides))


def _ends(axis: Axis) -> tuple[Int[np.ndarray, "tiles"], Int[np.ndarray, "tiles"]]:
    """Returns the first and the last token of each tile."""
    first = np.arange(axis.tiles, dtype=np.int32) * axis.tile
    return axis.token(first), axis.token(first + (axis.tile - 1))


def _first(flags: Bool[Array, "b J M"]) -> Int[Array, "b J"]:
    """Returns where the first True stands; M if there is none."""
    return jnp.where(flags.any(-1), flags.argmax(-1), flags.shape[-1]).astype(jnp.int32)
