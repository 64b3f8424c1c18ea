"""BlockMask: which key blocks each query block attends to, and the transposed lists."""

import dataclasses

import jax
import numpy as np

from pallas_kernels import block_maps, tiles
from pallas_kernels.block_tables import FULL, PARTIAL, BlockTables
from pallas_kernels.checks import check_flag, check_integer
from pallas_kernels.rules import Dense, Rule, check_rule

__all__ = ["FULL", "PARTIAL", "BlockMask"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask(BlockTables):
    """The pattern of block-sparse attention: lists of the active tiles, both ways.

    Build one with `from_rule`, `from_block_map` or `from_top_k`. The arrays are numpy's
    for a static rule, or traced: learned selections, a traced offset; `BlockTables`
    says what they hold. a & b and a | b are exact too, for masks of the same tiles: one
    of the operands may have a single pattern head. They raise ValueError where no
    BlockMask says the result: `|` of different limits, two rules inside tiles.
    """

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
        prefix_length: int = 0,
        query_offset: tiles.Offset | None = None,
    ) -> "BlockMask":
        """Builds the tables of a closed-form rule in O(Hp M J) time.

        They are built on the host, unless query_offset is traced: then rows are sorted.

        Args:
            rule: `Dense`, `Local`, `Strided` or any other `Rule`.
            query_length: T in tokens.
            key_length: S in tokens; None means T.
            query_block_size: tokens in a query tile; None means the rule's block,
                halved while it is even and above 128, and for `Dense` a power of two
                from 128 to 512 that is at most a quarter of the tokens if it can be,
                but no more than there are tokens.
            key_block_size: tokens in a key tile; None means the same, and up to 256
                for `Dense`.
            is_causal: drop tiles without any pair j <= i.
            window_size: drop tiles without any pair |i - j| < window_size.
            prefix_length: keys that causality does not hide (a prefix LM): keep
                j < prefix_length beside j <= i, within the window and the rule.
            query_offset: position of the first query; None means S - T, which lets
                the last query sit on the last key.

        Raises:
            ValueError: a length or size is not positive, or there is a prefix without
                causality.
        """
        check_rule(rule)
        key_length = query_length if key_length is None else key_length
        check_integer("query_length", query_length)
        check_integer("key_length", key_length)
        if query_block_size is None:
            query_block_size = tiles.default_tile(rule, query_length, "query")
        if key_block_size is None:
            key_block_size = tiles.default_tile(rule, key_length, "key")
        geometry = tiles.Geometry(
            query_length,
            key_length,
            query_block_size,
            key_block_size,
            is_causal,
            window_size,
            prefix_length,
        )
        offset = geometry.default_offset if query_offset is None else query_offset
        active, full, is_uniform = tiles.rule_tiles(rule, geometry, offset)
        return cls._from_tiles(active, full, geometry, offset, rule=rule, is_uniform=is_uniform)

    @classmethod
    def from_block_map(
        cls,
        block_map: block_maps.Selection,
        query_length: int,
        key_length: int,
        query_block_size: int,
        key_block_size: int,
        *,
        is_causal: bool,
        window_size: int | None = None,
        prefix_length: int = 0,
        query_offset: tiles.Offset | None = None,
        capacity: int | None = None,
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
            prefix_length: see `from_rule`.
            query_offset: see `from_rule`.
            capacity: most key blocks that a query block attends to; None means J. In a
                traced map that asks for more, rows keep their first ones, in both
                orientations, and `overflow` is True for the pattern head.

        Raises:
            ValueError: block_map is not boolean or does not end in (M, J), a length or
                size is not positive, a numpy map exceeds the capacity, or there is a
                prefix without causality.
        """
        geometry = tiles.Geometry(
            query_length,
            key_length,
            query_block_size,
            key_block_size,
            is_causal,
            window_size,
            prefix_length,
        )
        block_maps.check_block_map(block_map, geometry)
        offset = geometry.default_offset if query_offset is None else query_offset
        return cls._from_selection(block_map, geometry, offset, capacity)

    @classmethod
    def from_top_k(
        cls,
        indices: block_maps.Selection,
        query_length: int,
        key_length: int,
        query_block_size: int,
        key_block_size: int,
        *,
        is_causal: bool,
        window_size: int | None = None,
        prefix_length: int = 0,
        query_offset: tiles.Offset | None = None,
    ) -> "BlockMask":
        """Builds the tables from the numbers of the key blocks of each query block.

        Tiles that causality or the window hide are dropped.

        Args:
            indices: integers [Hp, M, k], a batch axis in front is optional: what
                `jax.lax.top_k` returns, or any numbers, in any order. Negative ones
                mean none, repeated ones count once. Traced ones of J or more are left
                out, and `overflow` is True for the pattern head.
            query_length: T in tokens.
            key_length: S in tokens.
            query_block_size: tokens in a query tile.
            key_block_size: tokens in a key tile.
            is_causal: see `from_rule`.
            window_size: see `from_rule`.
            prefix_length: see `from_rule`.
            query_offset: see `from_rule`.

        Raises:
            ValueError: indices are not integers, do not end in (M, k) or, in a numpy
                array, reach J; a length or size is not positive; or there is a prefix
                without causality.
        """
        geometry = tiles.Geometry(
            query_length,
            key_length,
            query_block_size,
            key_block_size,
            is_causal,
            window_size,
            prefix_length,
        )
        block_map, overflow = block_maps.from_indices(indices, geometry)
        offset = geometry.default_offset if query_offset is None else query_offset
        mask = cls._from_selection(block_map, geometry, offset, indices.shape[-1])
        return dataclasses.replace(mask, overflow=mask.overflow | overflow)

    @classmethod
    def _from_selection(
        cls,
        block_map: tiles.Mask,
        geometry: tiles.Geometry,
        offset: tiles.Offset,
        capacity: int | None,
    ) -> "BlockMask":
        seen, whole, _ = tiles.rule_tiles(Dense(), geometry, offset)
        active, overflow = block_map & seen, None
        if capacity is not None:
            active, overflow = block_maps.cut(active, capacity)
        return cls._from_tiles(
            *(active, active & whole, geometry, offset),
            capacities=(capacity, None),
            overflow=overflow,
        )

    @classmethod
    def _from_tiles(
        cls,
        active: tiles.Mask,
        full: tiles.Mask,
        geometry: tiles.Geometry,
        offset: tiles.Offset,
        *,
        rule: Rule | None = None,
        is_uniform: bool = True,
        capacities: tuple[int | None, int | None] = (None, None),
        overflow: block_maps.Overflow | None = None,
    ) -> "BlockMask":
        """Lists tiles; capacities are what traced lists of keys and of queries hold."""
        partial = active.astype(np.int8) * PARTIAL
        kinds = partial + full.astype(np.int8) * (FULL - PARTIAL)
        return cls(
            *tiles.compact(kinds, capacities[0]),
            *tiles.compact(kinds.swapaxes(-1, -2), capacities[1]),
            overflow=np.zeros(kinds.shape[:-2], bool) if overflow is None else overflow,
            head_numbers=np.broadcast_to(
                np.arange(kinds.shape[-3], dtype=np.int32), kinds.shape[:-2]
            ),
            query_offset=tiles.as_scalar(offset),
            rule=rule,
            is_uniform=is_uniform,
            **dataclasses.asdict(geometry),
        )

    def tightened(
        self,
        is_causal: bool,
        window_size: int | None,
        query_offset: tiles.Offset | None,
    ) -> "BlockMask":
        """Returns the same lists under limits no looser than they were built with.

        What a traced offset shows beyond them stays hidden, as it is not listed.

        Raises:
            ValueError: a limit is looser, or an offset known on the host moves one, so
                that tiles it shows are not listed.
        """
        check_flag("is_causal", is_causal)
        if window_size is not None:
            check_integer("window_size", window_size)
        offset = self.query_offset if query_offset is None else tiles.as_scalar(query_offset)
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
        self._check_offset(offset)
        limits_agree = (is_causal, window_size) == (self.is_causal, built)
        if limits_agree and query_offset is None:
            return self
        return dataclasses.replace(
            self,
            # Where the lists say it all, they keep saying it at another offset.
            rule=self.inner_rule if query_offset is not None else self.rule,
            kv_kinds=self.kv_kinds.clip(max=PARTIAL),
            q_kinds=self.q_kinds.clip(max=PARTIAL),
            query_offset=offset,
            is_causal=is_causal,
            window_size=window_size,
        )

    def _check_offset(self, query_offset: tiles.Offset) -> None:
        built, is_windowed = self.query_offset, self.window_size is not None
        if not isinstance(built, np.ndarray) or isinstance(query_offset, jax.Array):
            return
        shows_later = (self.is_causal or is_windowed) and query_offset > built
        shows_earlier = (self.is_anticausal or is_windowed) and query_offset < built
        if shows_later or shows_earlier:
            raise ValueError(
                f"query_offset={query_offset} shows tiles that block_mask, built with "
                f"query_offset={built}, does not list: build it with query_offset={query_offset}"
            )

    def transpose(self) -> "BlockMask":
        """Returns the mask in which keys and queries have changed places.

        `to_dense` is transposed too. The first query, once the first key, gets position
        -query_offset.

        Raises:
            ValueError: a rule decides inside tiles, or there is a prefix.
        """
        if self.inner_rule is not None:
            raise ValueError(
                f"the rule {self.inner_rule} decides inside tiles, and has no transpose: "
                "leave out the tile sizes, so that tiles follow its blocks"
            )
        return BlockMask(
            self.q_counts,
            self.q_indices,
            self.q_kinds,
            self.kv_counts,
            self.kv_indices,
            self.kv_kinds,
            overflow=self.overflow,
            head_numbers=self.head_numbers,
            query_offset=tiles.as_scalar(-self.query_offset),
            rule=None,
            is_uniform=True,
            **dataclasses.asdict(self.geometry.transposed()),
        )

    def __and__(self, other: "BlockMask") -> "BlockMask":
        if not isinstance(other, BlockMask):
            return NotImplemented
        geometry = self.geometry & other.geometry
        rule = self._rule_beside(other, {self.inner_rule, other.inner_rule} - {None})
        seen, _, _ = tiles.rule_tiles(Dense(), geometry, self.query_offset)
        return self._from_tiles(
            self.block_map() & other.block_map() & seen,
            self.full_map() & other.full_map(),
            geometry,
            self.query_offset,
            rule=rule,
            is_uniform=rule is None,
            capacities=(
                min(self.kv_indices.shape[-1], other.kv_indices.shape[-1]),
                min(self.q_indices.shape[-1], other.q_indices.shape[-1]),
            ),
            overflow=self.overflow | other.overflow,
        )

    def __or__(self, other: "BlockMask") -> "BlockMask":
        if not isinstance(other, BlockMask):
            return NotImplemented
        geometry = self.geometry | other.geometry
        rule = self._rule_beside(other, {self.inner_rule, other.inner_rule})
        return self._from_tiles(
            self.block_map() | other.block_map(),
            self.full_map() | other.full_map(),
            geometry,
            self.query_offset,
            rule=rule,
            is_uniform=rule is None,
            capacities=(
                self.kv_indices.shape[-1] + other.kv_indices.shape[-1],
                self.q_indices.shape[-1] + other.q_indices.shape[-1],
            ),
            overflow=self.overflow | other.overflow,
        )

    def _rule_beside(self, other: "BlockMask", rules: set[Rule | None]) -> Rule | None:
        """Returns the one rule that is to decide inside tiles, once sure that it does."""
        heads = (self.overflow.shape, other.overflow.shape)
        try:
            pattern_heads = np.broadcast_shapes(*heads)[-1]
        except ValueError as error:
            raise ValueError(
                f"[batch and] pattern heads are {heads[0]} on the left, {heads[1]} on the "
                "right: masks combine when these are equal or 1"
            ) from error
        offsets = (self.query_offset, other.query_offset)
        is_traced = any(isinstance(offset, jax.core.Tracer) for offset in offsets)
        if offsets[0] is not offsets[1] and (is_traced or offsets[0] != offsets[1]):
            raise ValueError(
                f"query_offset={offsets[0]} on the left, query_offset={offsets[1]} on the "
                "right; build both masks with the same, if traced, one int32 array"
            )
        rule = next(iter(rules), None)
        if len(rules) > 1 or (rule is not None and rule.pattern_heads != pattern_heads):
            raise ValueError(
                f"inside tiles decides {self.inner_rule} on the left, {other.inner_rule} on "
                f"the right; no one rule does for {pattern_heads} pattern heads: leave out the "
                "tile sizes, so that tiles follow the blocks of the rules"
            )
        return rule
