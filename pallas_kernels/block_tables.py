"""BlockTables: the lists of a BlockMask, and what can be read from them.

The tables hold block numbers only. Facts about tokens (the causal triangle, the window,
ragged ends, a rule finer than the tiles) are closed forms that a kernel evaluates
inside tiles marked "partial"; a T x S mask never exists.
"""

import dataclasses
import os
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import pictures, tiles
from pallas_kernels.checks import check_integer
from pallas_kernels.rules import Dense, Rule

PARTIAL = 1
FULL = 2

# An array, numpy's or JAX's, or what a tree transformation puts in its place.
_Table = Any
_Tables = TypeVar("_Tables", bound="BlockTables")
_STATIC = {"static": True}
_BY_HEAD = (
    *("kv_counts", "kv_indices", "kv_kinds", "q_counts", "q_indices", "q_kinds"),
    *("overflow", "head_numbers"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTables:
    """Lists of the active tiles of both orientations, and the limits they were made with.

    Hp pattern heads are 1, K or N; M = ceil(T / query_block_size); J = ceil(S /
    key_block_size); C and R are the capacities. Entries past the count repeat the last
    valid one. All tables may have a batch axis in front.

    Attributes:
        kv_counts: [Hp, M], active key blocks of each query block.
        kv_indices: [Hp, M, C], their numbers, ascending.
        kv_kinds: [Hp, M, C], PARTIAL when some pair of the tile is masked, else FULL.
        q_counts: [Hp, J], active query blocks of each key block.
        q_indices: [Hp, J, R], their numbers, ascending.
        q_kinds: [Hp, J, R], as kv_kinds.
        overflow: [Hp], True where traced values asked for more than is listed: see
            `from_block_map` and `from_top_k`.
        head_numbers: [Hp], which heads of the rule these are; a device may hold some.
        query_offset: position of the first query on the axis where the first key is 0.
        query_length: T in tokens.
        key_length: S in tokens.
        query_block_size: tokens in a query tile.
        key_block_size: tokens in a key tile.
        is_causal: tiles without any pair j <= i were dropped.
        window_size: tiles without any pair |i - j| < window_size were dropped.
        prefix_length: keys before it are not hidden by causality.
        is_anticausal: tiles without any pair j >= i were dropped, see `transpose`.
        rule: the closed form that the lists came from, if they did.
        is_uniform: the rule is constant on the pairs of every listed tile.
    """

    kv_counts: _Table
    kv_indices: _Table
    kv_kinds: _Table
    q_counts: _Table
    q_indices: _Table
    q_kinds: _Table
    overflow: _Table
    head_numbers: _Table
    query_offset: _Table
    query_length: int = dataclasses.field(metadata=_STATIC)
    key_length: int = dataclasses.field(metadata=_STATIC)
    query_block_size: int = dataclasses.field(metadata=_STATIC)
    key_block_size: int = dataclasses.field(metadata=_STATIC)
    is_causal: bool = dataclasses.field(metadata=_STATIC)
    window_size: int | None = dataclasses.field(metadata=_STATIC)
    prefix_length: int = dataclasses.field(metadata=_STATIC)
    is_anticausal: bool = dataclasses.field(metadata=_STATIC)
    rule: Rule | None = dataclasses.field(metadata=_STATIC)
    is_uniform: bool = dataclasses.field(metadata=_STATIC)

    @property
    def geometry(self) -> tiles.Geometry:
        """The lengths, tile sizes and limits."""
        names = [field.name for field in dataclasses.fields(tiles.Geometry)]
        return tiles.Geometry(**{name: getattr(self, name) for name in names})

    @property
    def inner_rule(self) -> Rule | None:
        """What decides pairs inside partial tiles; None when the lists say it all."""
        return None if self.is_uniform else self.rule

    def block_map(self) -> tiles.Mask:
        """Returns [*B, Hp, M, J] booleans, True where a tile is listed."""
        return tiles.expand(self.kv_counts, self.kv_indices, self.geometry.key_blocks)

    def full_map(self) -> tiles.Mask:
        """Returns [*B, Hp, M, J] booleans, True where a tile is listed as FULL."""
        listed = np.arange(self.kv_indices.shape[-1]) < self.kv_counts[..., None]
        is_full = listed & (self.kv_kinds == FULL)
        return tiles.scatter(is_full, self.kv_indices, self.geometry.key_blocks)

    def to_dense(self) -> tiles.Mask:
        """Returns the token mask [*B, Hp, T, S], for tests and for `reference`."""
        geometry = self.geometry
        query, key = np.arange(self.query_length), np.arange(self.key_length)
        listed = self.block_map()[..., query // self.query_block_size, :]
        listed = listed[..., key // self.key_block_size]
        head = self.head_numbers[..., None, None]
        position = query[:, None] + self.query_offset
        pairs = tiles.rule_pairs(self.inner_rule, head, position, key)
        return listed & geometry.pairs(position, key) & pairs

    def take_heads(self: _Tables, first: int | np.integer | Int[Array, ""], count: int) -> _Tables:
        """Returns count pattern heads from one on: what a device that holds these needs.

        Args:
            first: number of the first, which may be traced, as in `jax.shard_map`: nothing
                can be said of a traced one, and one beyond the last is moved back.
            count: how many.

        Raises:
            ValueError: first or count is no integer, or there are fewer heads.
        """
        heads = self.overflow.shape[-1]
        check_integer("count", count)
        is_traced = isinstance(first, jax.core.Tracer)
        if not is_traced:
            first = first.item() if isinstance(first, jax.Array) else first
            check_integer("first", first, least=0)
        if count > heads or not (is_traced or first + count <= heads):
            raise ValueError(
                f"first={first} and count={count} must lie within the {heads} pattern heads"
            )
        axis = self.overflow.ndim - 1

        def take(table: _Table) -> _Table:
            if is_traced or isinstance(table, jax.Array):
                return jax.lax.dynamic_slice_in_dim(table, first, count, axis)
            return table.take(range(first, first + count), axis)

        return dataclasses.replace(self, **{name: take(getattr(self, name)) for name in _BY_HEAD})

    def density(self) -> Float[Array, ""] | float:
        """Returns the tiles attended to over those of dense attention with the same limits.

        Either way a tile counts when the limits leave some pair of it. 0 where they
        leave dense attention nothing.
        """
        dense, _, _ = tiles.rule_tiles(Dense(), self.geometry, self.query_offset)
        # Lists made under looser limits hold tiles that these hide.
        attended = self.block_map() & dense
        patterns = self.kv_counts.size // self.geometry.query_blocks
        return attended.sum() / (patterns * dense.sum().clip(1))

    def picture(self, batch: int = 0) -> str:
        """Returns a picture in text, a character per block; coarser if there are many.

        Args:
            batch: which entry to show when the tables have a batch axis.

        Raises:
            ValueError: the tables are traced.
        """
        return pictures.text(self._kinds_to_draw(batch), self._title(batch))

    def save_picture(self, path: str | os.PathLike[str], batch: int = 0) -> None:
        """Writes a picture as PNG, a panel per pattern head, axes in tokens.

        Args:
            path: the file.
            batch: which entry to show when the tables have a batch axis.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the tables are traced.
        """
        kinds, title = self._kinds_to_draw(batch), self._title(batch)
        pictures.save(kinds, self.geometry, int(self.query_offset), title, path)

    def _kinds_to_draw(self, batch: int) -> np.ndarray:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in (self.kv_counts, self.query_offset)):
            raise ValueError("block_mask is traced, its blocks are not known: draw it outside jit")
        kinds = np.asarray(self.block_map()).astype(np.int32) + np.asarray(self.full_map())
        return kinds[batch] if kinds.ndim == 4 else kinds

    def _title(self, batch: int) -> str:
        entry = f", batch entry {batch}" if self.kv_counts.ndim == 3 else ""
        return (
            f"{self.query_length} queries x {self.key_length} keys in tiles of "
            f"{self.query_block_size} x {self.key_block_size}, "
            f"density {float(self.density()):.3f}{entry}"
        )
