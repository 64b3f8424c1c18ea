"""BlockMask: which key blocks each query block attends to, and the transposed lists.

The tables hold block numbers only. Facts about tokens (the causal triangle, the window,
ragged ends, a rule finer than the tiles) are closed forms that a kernel evaluates
inside tiles marked "partial"; a T x S mask never exists.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from pallas_kernels import tiles
from pallas_kernels.rules import Dense, Rule

PARTIAL = 1
FULL = 2

# (query, key) tiles. Small ones waste less of the causal triangle, large ones less time
# on overhead: a short list wants the former, a long one the latter.
_LARGEST_RULE_TILE = 128
_DENSE_TILES = (512, 256)

# An integer array, numpy's or JAX's, or what a tree transformation puts in its place.
_Table = Any
_BlockMap = Shaped[Array, "*B Hp M J"] | Shaped[np.ndarray, "*B Hp M J"]
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """The pattern of block-sparse attention: lists of the active tiles, both ways.

    Build one with `from_rule` or `from_block_map`. The arrays are numpy's for a static
    rule, or traced: learned selections, a traced offset. Hp pattern heads are 1, K or
    N; M = ceil(T / query_block_size); J = ceil(S / key_block_size); C and R are the
    capacities. Entries past the count repeat the last valid one. All tables may have a
    batch axis in front.

    Attributes:
        kv_counts: [Hp, M], active key blocks of each query block.
        kv_indices: [Hp, M, C], their numbers, ascending.
        kv_kinds: [Hp, M, C], PARTIAL when some pair of the tile is masked, else FULL.
        q_counts: [Hp, J], active query blocks of each key block.
        q_indices: [Hp, J, R], their numbers, ascending.
        q_kinds: [Hp, J, R], as kv_kinds.
        query_offset: position of the first query on the axis where the first key is 0.
        query_length: T in tokens.
        key_length: S in tokens.
        query_block_size: tokens in a query tile.
        key_block_size: tokens in a key tile.
        is_causal: tiles without any pair j <= i were dropped.
        window_size: tiles without any pair |i - j| < window_size were dropped.
        rule: the closed form that the lists came from, if they did.
        is_uniform: the rule is constant on the pairs of every listed tile.
    """

    kv_counts: _Table
    kv_indices: _Table
    kv_kinds: _Table
    q_counts: _Table
    q_indices: _Table
    q_kinds: _Table
    query_offset: _Table
    query_length: int = dataclasses.field(metadata=_STATIC)
    key_length: int = dataclasses.field(metadata=_STATIC)
    query_block_size: int = dataclasses.field(metadata=_STATIC)
    key_block_size: int = dataclasses.field(metadata=_STATIC)
    is_causal: bool = dataclasses.field(metadata=_STATIC)
    window_size: int | None = dataclasses.field(metadata=_STATIC)
    rule: Rule | None = dataclasses.field(metadata=_STATIC)
    is_uniform: bool = dataclasses.field(metadata=_STATIC)

    @classmethod
    def from_rule(
        cls,
        rule: Rule,
        query_length: int,
        key_length: int | None = None,
        query_block_size: int | None = None,
        key_block_size: int | None = None,
        *,
        is_causal: bool,
        window_size: int | None = None,
        query_offset: tiles.Offset | None = None,
    ) -> "BlockMask":
        """Builds the tables of a closed-form rule in O(Hp M J) time.

        They are built on the host, unless query_offset is traced.

        Args:
            rule: `Dense`, `Local`, `Strided` or any other `Rule`.
            query_length: T in tokens.
            key_length: S in tokens; None means T.
            query_block_size: tokens in a query tile; None means the rule's block,
                halved while it is even and above 128, and 512 for `Dense`, but no
                more than there are tokens.
            key_block_size: tokens in a key tile; None means the same, and 256 for
                `Dense`.
            is_causal: drop tiles without any pair j <= i.
            window_size: drop tiles without any pair |i - j| < window_size.
            query_offset: position of the first query; None means S - T, which lets
                the last query sit on the last key.

        Raises:
            ValueError: a length or size is not positive.
        """
        key_length = query_length if key_length is None else key_length
        if query_block_size is None:
            query_block_size = _default_tile(rule, query_length, _DENSE_TILES[0])
        if key_block_size is None:
            key_block_size = _default_tile(rule, key_length, _DENSE_TILES[1])
        geometry = tiles.Geometry(
            query_length,
            key_length,
            query_block_size,
            key_block_size,
            is_causal,
            window_size,
        )
        offset = geometry.default_offset if query_offset is None else query_offset
        active, full, is_uniform = tiles.rule_tiles(rule, geometry, offset)
        return cls._from_tiles(active, full, geometry, offset, rule, is_uniform)

    @classmethod
    def from_block_map(
        cls,
        block_map: _BlockMap,
        query_length: int,
        key_length: int,
        query_block_size: int,
        key_block_size: int,
        *,
        is_causal: bool,
        window_size: int | None = None,
        query_offset: tiles.Offset | None = None,
    ) -> "BlockMask":
        """Builds the tables of any selection of blocks, which may be traced.

        Tiles that causality or the window hide are dropped.

        Args:
            block_map: booleans, True where a tile is attended.
            query_length: T in tokens.
            key_length: S in tokens.
            query_block_size: tokens in a query tile.
            key_block_size: tokens in a key tile.
            is_causal: see `from_rule`.
            window_size: see `from_rule`.
            query_offset: see `from_rule`.

        Raises:
            ValueError: block_map is not boolean or does not end in (M, J), or a length
                or size is not positive.
        """
        geometry = tiles.Geometry(
            query_length,
            key_length,
            query_block_size,
            key_block_size,
            is_causal,
            window_size,
        )
        _check_block_map(block_map, geometry)
        offset = geometry.default_offset if query_offset is None else query_offset
        active, full, _ = tiles.rule_tiles(Dense(), geometry, offset)
        return cls._from_tiles(block_map & active, block_map & full, geometry, offset)

    @classmethod
    def _from_tiles(
        cls,
        active: tiles.Mask,
        full: tiles.Mask,
        geometry: tiles.Geometry,
        offset: tiles.Offset,
        rule: Rule | None = None,
        is_uniform: bool = True,
    ) -> "BlockMask":
        partial = active.astype(np.int32) * PARTIAL
        kinds = partial + full.astype(np.int32) * (FULL - PARTIAL)
        return cls(
            *tiles.compact(kinds),
            *tiles.compact(kinds.swapaxes(-1, -2)),
            query_offset=tiles.as_scalar(offset),
            rule=rule,
            is_uniform=is_uniform,
            **dataclasses.asdict(geometry),
        )

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

    def to_dense(self) -> tiles.Mask:
        """Returns the token mask [*B, Hp, T, S], for tests and for `reference`."""
        geometry = self.geometry
        query, key = np.arange(self.query_length), np.arange(self.key_length)
        listed = self.block_map()[..., query // self.query_block_size, :]
        listed = listed[..., key // self.key_block_size]
        head = np.arange(listed.shape[-3])[:, None, None]
        position = query[:, None] + self.query_offset
        pairs = tiles.rule_pairs(self.inner_rule, head, position, key)
        return listed & geometry.pairs(position, key) & pairs

    def density(self) -> Float[Array, ""] | float:
        """Returns listed tiles over those of dense attention with the same limits."""
        dense, _, _ = tiles.rule_tiles(Dense(), self.geometry, self.query_offset)
        patterns = self.kv_counts.size // self.geometry.query_blocks
        return self.kv_counts.sum() / (patterns * dense.sum())

    def tightened(
        self,
        is_causal: bool,
        window_size: int | None,
        query_offset: tiles.Offset | None,
    ) -> "BlockMask":
        """Returns the same lists under limits no looser than they were built with.

        Raises:
            ValueError: a limit is looser, so that tiles it shows are not listed.
        """
        if self.is_causal and not is_causal:
            raise ValueError(
                "is_causal=False, but block_mask was built with is_causal=True: "
                "build it with is_causal=False"
            )
        built = self.window_size
        if built is not None and (window_size is None or window_size > built):
            raise ValueError(
                f"window_size={window_size} is wider than the {built} that block_mask "
                "was built with: pass that, or build block_mask with the wider one"
            )
        limits_agree = (is_causal, window_size) == (self.is_causal, built)
        if limits_agree and query_offset is None:
            return self
        offset = self.query_offset if query_offset is None else query_offset
        return dataclasses.replace(
            self,
            # Where the lists say it all, they keep saying it at another offset.
            rule=self.inner_rule if query_offset is not None else self.rule,
            kv_kinds=self.kv_kinds.clip(max=PARTIAL),
            q_kinds=self.q_kinds.clip(max=PARTIAL),
            query_offset=tiles.as_scalar(offset),
            is_causal=is_causal,
            window_size=window_size,
        )


def _default_tile(rule: Rule, length: int, dense: int) -> int:
    tile = rule.block_size
    if tile is None:
        return min(dense, length)
    while tile % 2 == 0 and tile > _LARGEST_RULE_TILE:
        tile //= 2
    return min(tile, length)


def _check_block_map(block_map: _BlockMap, geometry: tiles.Geometry) -> None:
    expected = (geometry.query_blocks, geometry.key_blocks)
    if block_map.ndim not in (3, 4) or block_map.shape[-2:] != expected:
        raise ValueError(
            f"block_map has shape {block_map.shape}, but these lengths and sizes make "
            f"{expected[0]} query blocks and {expected[1]} key blocks: pass "
            f"[heads, {expected[0]}, {expected[1]}], a batch axis in front is optional"
        )
    if block_map.dtype != bool:
        raise ValueError(f"block_map has dtype {block_map.dtype}: pass booleans, True = attended")
