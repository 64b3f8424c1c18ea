"""Patterns n:m: of every m entries in a row along an axis, n are kept.

The axis is the one that a product sums over, as sparse tensor cores ask. Functions take an axis
counted from the end, so that they work alike on a layer's kernel and on stacked ones, and divided
over a mesh as long as no device's part cuts a group.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from sparseformer_jax import mesh
from sparseformer_jax.checks import ConfigError

# Pairs of a group are compared up to this size, m^2 comparisons; larger groups are sorted.
_LARGEST_COMPARED = 16
MOST_CANDIDATES = 70  # 4:8


@dataclasses.dataclass(frozen=True)
class Pattern:
    """n of every m.

    Attributes:
      n: entries kept.
      m: entries of a group.

    Raises:
      ValueError: n is not from 1 to m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ConfigError(f"pattern {self}: keeps {self.n} of {self.m}; n must be from 1 to m")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """The kept fraction."""
        return self.n / self.m

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Returns the pattern that is written as "2:4".

        Raises:
          ValueError: it is none.
        """
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
        if match is None:
            raise ConfigError(f"pattern {text!r}: must be n:m, n kept of every m, as 2:4")
        return cls(int(match[1]), int(match[2]))


def mask(
    scores: Float[Array, "*S"], n: int | Int[Array, ""], m: int, axis: int
) -> Bool[Array, "*S"]:
    """Returns which entries are the n largest of their group of m along an axis.

    Of equal ones those of lower index are dropped first, as by a stable sort.

    Args:
      scores: of the entries.
      n: how many are kept, may be traced; m keeps all.
      m: entries of a group.
      axis: along which groups lie, negative.

    Raises:
      ValueError: the axis is no multiple of m.
    """
    grouped = groups(scores, m, axis)
    return ungroup(_ranks(grouped, axis) >= m - jnp.asarray(n), axis)


def groups(x: Shaped[Array, "*S"], m: int, axis: int) -> Shaped[Array, "*G"]:
    """Returns x with the axis cut into [groups, m]: `axis` is that of the m entries now.

    Raises:
      ValueError: the axis is no multiple of m.
    """
    if x.shape[axis] % m:
        raise ConfigError(f"an axis of {x.shape[axis]} entries does not divide into groups of {m}")
    place = x.ndim + axis
    shape = (*x.shape[:place], x.shape[axis] // m, m, *x.shape[place + 1 :])
    return _reshape(x, shape, lambda spec: (*spec[: place + 1], None, *spec[place + 1 :]))


def ungroup(x: Shaped[Array, "*G"], axis: int) -> Shaped[Array, "*S"]:
    """Returns what `groups` was given."""
    place = x.ndim + axis
    shape = (*x.shape[: place - 1], x.shape[place - 1] * x.shape[place], *x.shape[place + 1 :])
    return _reshape(x, shape, lambda spec: (*spec[:place], *spec[place + 1 :]))


def _reshape(
    x: jax.Array,
    shape: tuple[int, ...],
    new_spec: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> jax.Array:
    if not mesh.is_active():
        return jnp.reshape(x, shape)
    spec = jax.typeof(x).sharding.spec
    whole = (*spec, *(None,) * (x.ndim - len(spec)))
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(*new_spec(whole)))


def _ranks(grouped: Shaped[Array, "*G"], axis: int) -> Int[Array, "*G"]:
    """How many entries of its group are dropped before an entry."""
    m = grouped.shape[axis]
    if m > _LARGEST_COMPARED:
        order = jnp.argsort(grouped, axis=axis, stable=True)
        return jnp.argsort(order, axis=axis)
    place = grouped.ndim + axis
    index = jax.lax.broadcasted_iota(jnp.int32, (m,) + (1,) * (-axis - 1), 0)
    ranks = jnp.zeros_like(grouped, jnp.int32)
    for other in range(m):
        compared = jax.lax.slice_in_dim(grouped, other, other + 1, axis=place)
        ranks += (grouped > compared) | ((grouped == compared) & (index > other))
    return ranks


def candidates(n: int, m: int) -> UInt8[np.ndarray, "C m"]:
    """Returns all masks of a group, those that keep early entries first: 1100, 1010, 1001, ..

    Raises:
      ValueError: there are more than 70.
    """
    count = math.comb(m, n)
    if count > MOST_CANDIDATES:
        raise ConfigError(
            f"pattern {n}:{m}: {count:,} masks of a group; must be at most {MOST_CANDIDATES}, as "
            "of 4:8"
        )
    table = np.zeros((count, m), np.uint8)
    for row, kept in zip(table, itertools.combinations(range(m), n), strict=True):
        row[list(kept)] = 1
    return table


def holds(kept: np.ndarray, pattern: Pattern, axis: int) -> bool:
    """Returns whether exactly n of every m entries along an axis are kept."""
    if kept.shape[axis] % pattern.m:
        return False
    grouped = groups_on_host(kept, pattern.m, axis)
    return bool((grouped.sum(axis=-1) == pattern.n).all())


def groups_on_host(x: np.ndarray, m: int, axis: int) -> np.ndarray:
    """Returns the groups of m along an axis, as the last axis of an array on the host."""
    moved = np.moveaxis(x, axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, m)
