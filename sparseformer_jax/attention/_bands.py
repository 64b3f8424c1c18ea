"""Attention of blocks of slots to themselves and to those right before, where a group goes on.

As in `_tiles` no scores are kept, and a CPU takes as many blocks at a time as its cache holds:
it reads their windows where they lie, and adds to the gradients in place.

Letters: Z rows of L slots in M blocks of P; W = (back + 1) P keys in a window.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from sparseformer_jax.attention import _tiles


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static.

    Attributes:
      size: P.
      back: blocks that a block sees before itself.
      window_size: slots that a slot sees, itself counted.
      masks_self: a slot sees itself only where it sees no other.
      scores: how `_tiles.attend` makes scores.
    """

    size: int
    back: int
    window_size: int
    masks_self: bool
    scores: _tiles.Plan

    @property
    def place(self) -> np.ndarray:
        """Of a window's keys, counted from each query of its block, [P, W]."""
        return np.arange(-self.back * self.size, self.size) - np.arange(self.size)[:, None]

    @property
    def last_resort(self) -> jax.Array | None:
        """Pairs that count only where a query sees no other."""
        return jnp.asarray(self.place == 0) if self.masks_self else None


class Rows(NamedTuple):
    """Rows of slots, behind `back` blocks that nobody asks for.

    Attributes:
      x: queries and keys at once, [Z, (back + M) P, H].
      value: [Z, (back + M) P, H].
      group: of each block [Z, back + M]; another group's slots are not seen.
      ids: documents [Z, (back + M) P], another of which is not seen; None: there is one.
    """

    x: Any
    value: Any
    group: Any
    ids: Any = None


def tiles(plan: Plan, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns queries [Z, M, P, H], keys and values [Z, M, W, H], and visible pairs [Z, M, P, W].

    Slots that are empty stand behind those of their group, where causality hides them.
    """
    x, value = (_blocks(x, plan.size) for x in (rows.x, rows.value))
    place, group = plan.place, rows.group[..., None]
    visible = jnp.asarray((place <= 0) & (place > -plan.window_size))
    is_own = _windows(group, plan.back) == group[:, plan.back :]
    visible &= jnp.repeat(is_own, plan.size, axis=-1)[:, :, None]
    if rows.ids is not None:
        ids = _blocks(rows.ids, plan.size)
        visible &= ids[:, plan.back :, :, None] == _windows(ids, plan.back)[:, :, None]
    return x[:, plan.back :], _windows(x, plan.back), _windows(value, plan.back), visible


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, rows: Rows, relative: _tiles.Relative | None) -> Float[Array, "Z L H"]:
    """Returns attention of every slot to the last ones of its group.

    Args:
      plan: what is static.
      rows: of slots.
      relative: embeddings of the difference of places.
    """
    return jax.lax.platform_dependent(
        rows,
        relative,
        cpu=functools.partial(_forward_in_parts, plan),
        default=functools.partial(_together, plan),
    )


def _attend_fwd(plan: Plan, *arrays: Any) -> tuple[Float[Array, "Z L H"], tuple[Any, ...]]:
    return attend(plan, *arrays), arrays


def _attend_bwd(
    plan: Plan, residuals: tuple[Rows, _tiles.Relative | None], d_out: Float[Array, "Z L H"]
) -> tuple[Rows, _tiles.Relative | None]:
    rows, relative = residuals
    d_x, d_value, d_relative = jax.lax.platform_dependent(
        rows,
        relative,
        d_out,
        cpu=functools.partial(_backward_in_parts, plan),
        default=functools.partial(_gradients, plan),
    )
    return Rows(d_x, d_value, None, None), d_relative


attend.defvjp(_attend_fwd, _attend_bwd)


def _together(plan: Plan, rows: Rows, relative: _tiles.Relative | None) -> Float[Array, "Z L H"]:
    """Attention of all slots at once."""
    *of_blocks, visible = (x.reshape(-1, *x.shape[2:]) for x in tiles(plan, rows))
    masks = [x for x in (visible, plan.last_resort) if x is not None]
    out = _tiles.together(plan.scores, tuple(of_blocks), relative, masks)
    return out.reshape(len(rows.x), -1, out.shape[-1])


def _gradients(
    plan: Plan, rows: Rows, relative: _tiles.Relative | None, d_out: Float[Array, "Z L H"]
) -> tuple[jax.Array, jax.Array, _tiles.Relative | None]:
    """Gradients of x, value and embeddings, from all scores at once."""

    def forward(x: jax.Array, value: jax.Array, relative: _tiles.Relative | None) -> jax.Array:
        return _together(plan, rows._replace(x=x, value=value), relative)

    return jax.vjp(forward, rows.x, rows.value, relative)[1](d_out)


def _forward_in_parts(
    plan: Plan, rows: Rows, relative: _tiles.Relative | None
) -> Float[Array, "Z L H"]:
    """Attention, part by part."""
    parts = _Parts.of(plan, rows)

    def step(number: jax.Array, out: jax.Array) -> jax.Array:
        part = _together(plan, parts.read_rows(number, rows), relative)
        return parts.write(number, out, part)

    out = jnp.zeros_like(rows.value[:, plan.back * plan.size :])
    return jax.lax.fori_loop(0, parts.count, step, out)


def _backward_in_parts(
    plan: Plan, rows: Rows, relative: _tiles.Relative | None, d_out: Float[Array, "Z L H"]
) -> tuple[jax.Array, jax.Array, _tiles.Relative | None]:
    """Gradients of x, value and embeddings, part by part."""
    parts = _Parts.of(plan, rows)

    def step(number: jax.Array, sums: Any) -> Any:
        part = parts.read_rows(number, rows)
        *of_slots, of_all = _gradients(plan, part, relative, parts.read(number, d_out, 0))
        of_slots = [
            parts.write(number, total, parts.read(number, total, plan.back) + x)
            for total, x in zip(sums[:2], of_slots, strict=True)
        ]
        return *of_slots, jax.tree.map(jnp.add, sums[2], of_all)

    start = jax.tree.map(jnp.zeros_like, (rows.x, rows.value, relative))
    return jax.lax.fori_loop(0, parts.count, step, start)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Some blocks of some rows at a time: as many as leave their scores in the cache."""

    plan: Plan
    rows: int
    blocks: int
    in_row: int
    count: int

    @classmethod
    def of(cls, plan: Plan, rows: Rows) -> "_Parts":
        num_rows, num_blocks = rows.group.shape
        num_blocks -= plan.back
        scores = plan.place.size
        part_rows = _tiles.group_size(num_rows, scores)
        blocks = _tiles.group_size(num_blocks, scores * part_rows)
        in_row = num_blocks // blocks
        return cls(plan, part_rows, blocks, in_row, in_row * num_rows // part_rows)

    def read(
        self, number: Any, x: Shaped[Array, "Z ..."], back: int, unit: int | None = None
    ) -> Shaped[Array, "z ..."]:
        """Returns a part's blocks of some units (None: P), behind as many others."""
        unit = self.plan.size if unit is None else unit
        shape = self.rows, (self.blocks + back) * unit, *x.shape[2:]
        return jax.lax.dynamic_slice(x, self._start(number, x, unit), shape)

    def read_rows(self, number: Any, rows: Rows) -> Rows:
        """Returns a part's slots."""
        back = self.plan.back
        group = self.read(number, rows.group, back, 1)
        x, value, ids = jax.tree.map(
            lambda x: self.read(number, x, back), (rows.x, rows.value, rows.ids)
        )
        return Rows(x, value, group, ids)

    def write(
        self, number: Any, x: Shaped[Array, "Z ..."], part: Shaped[Array, "z ..."]
    ) -> Shaped[Array, "Z ..."]:
        """Returns x with what `read` gave replaced."""
        return jax.lax.dynamic_update_slice(x, part, self._start(number, x, self.plan.size))

    def _start(self, number: Any, x: jax.Array, unit: int) -> tuple[Any, ...]:
        row, block = number // self.in_row * self.rows, number % self.in_row * self.blocks
        return row, block * unit, *(0,) * (x.ndim - 2)


def _blocks(x: Shaped[Array, "Z L ..."], size: int) -> Shaped[Array, "Z M P ..."]:
    return x.reshape(len(x), -1, size, *x.shape[2:])


def _windows(x: Shaped[Array, "Z M P ..."], back: int) -> Shaped[Array, "Z N W ..."]:
    """Returns each block behind `back` earlier ones, of all that have so many."""
    count = x.shape[1] - back
    return jnp.concatenate([x[:, j : j + count] for j in range(back + 1)], axis=2)
