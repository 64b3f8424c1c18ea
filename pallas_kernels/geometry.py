"""Geometry: lengths, tile sizes, and the limits that hold for every pair of tokens."""

import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.checks import check_flag, check_integer

Mask = Bool[np.ndarray, "..."] | Bool[Array, "..."]
Indices = Int[np.ndarray, "..."] | Int[Array, "..."]

# Far beyond any length, and int32 sums stay clear of 2^31.
_UNLIMITED = 2**30
_TILES = ("query_length", "key_length", "query_block_size", "key_block_size")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Lengths and tile sizes in tokens, and limits on pairs (i, j) of positions.

    `pairs` says what the limits mean. A kernel that does not call it keeps pairs with
    least <= i - j <= most, where `reach` is (least, most), but `prefix_least` takes the
    place of least for j < prefix_length.

    Attributes:
        query_length: T.
        key_length: S.
        query_block_size: tokens in a query tile.
        key_block_size: tokens in a key tile.
        is_causal: pairs have j <= i, but for those with j < prefix_length.
        window_size: pairs have |i - j| < window_size, if given.
        prefix_length: keys that causality does not hide: a prefix LM; 0 unless is_causal.
        is_anticausal: pairs have j >= i: the transpose of a causal mask.

    Raises:
        ValueError: a length or size is not a positive integer, is_causal no boolean, or a
            prefix has no causality to lift.
    """

    query_length: int
    key_length: int
    query_block_size: int
    key_block_size: int
    is_causal: bool
    window_size: int | None
    prefix_length: int = 0
    is_anticausal: bool = False

    def __post_init__(self) -> None:
        for name in _TILES:
            check_integer(name, getattr(self, name))
        if self.window_size is not None:
            check_integer("window_size", self.window_size)
        check_integer("prefix_length", self.prefix_length, least=0)
        check_flag("is_causal", self.is_causal)
        if self.prefix_length and not self.is_causal:
            raise ValueError(
                f"prefix_length={self.prefix_length} lifts causality, and there is none: "
                "pass is_causal=True, or leave it out"
            )

    @property
    def query_blocks(self) -> int:
        """M; the last tile may be ragged."""
        return -(-self.query_length // self.query_block_size)

    @property
    def key_blocks(self) -> int:
        """J; the last tile may be ragged."""
        return -(-self.key_length // self.key_block_size)

    @property
    def default_offset(self) -> int:
        """S - T: the last query sits on the last key."""
        return self.key_length - self.query_length

    @property
    def reach(self) -> tuple[int, int]:
        """Smallest and largest i - j of a visible pair outside the prefix."""
        back = -self.prefix_least
        return (0 if self.is_causal else -back), (0 if self.is_anticausal else back)

    @property
    def prefix_least(self) -> int:
        """Smallest i - j of a visible pair with j < prefix_length; the largest is that of all."""
        return -_UNLIMITED if self.window_size is None else 1 - self.window_size

    def pairs(self, query_position: Indices, key_position: Indices) -> Mask:
        """Returns which pairs the limits allow; arguments broadcast."""
        least, most = self.reach
        distance = query_position - key_position
        is_late_enough = distance >= least
        if self.prefix_length:
            in_prefix = key_position < self.prefix_length
            is_late_enough |= in_prefix & (distance >= self.prefix_least)
        return is_late_enough & (distance <= most)

    def spans(
        self, query_low: Indices, query_high: Indices, key_low: Indices, key_high: Indices
    ) -> tuple[Mask, Mask]:
        """Returns (some, every): are pairs of two spans of positions visible?

        Exact, from the first and last positions alone: between two spans i - j covers
        an interval. Arguments broadcast.
        """
        least, most = self.reach
        some = (query_high - key_low >= least) & (query_low - key_high <= most)
        every = query_low - key_high >= least
        if self.prefix_length:
            last = key_high.clip(max=self.prefix_length - 1)
            in_reach = (query_high - key_low >= self.prefix_least) & (query_low - last <= most)
            some |= (key_low <= last) & in_reach
            every |= (key_high <= last) & (query_low - key_high >= self.prefix_least)
        return some, every & (query_high - key_low <= most)

    def transposed(self) -> "Geometry":
        """Returns the limits when queries and keys change places, offset and all.

        Raises:
            ValueError: there is a prefix: it would be one of queries.
        """
        if self.prefix_length:
            raise ValueError(
                f"a mask with prefix_length={self.prefix_length} has no transpose, as that "
                "would need a prefix of queries: its q_counts and q_indices are the "
                "transposed lists"
            )
        return dataclasses.replace(
            self,
            query_length=self.key_length,
            key_length=self.query_length,
            query_block_size=self.key_block_size,
            key_block_size=self.query_block_size,
            is_causal=self.is_anticausal,
            is_anticausal=self.is_causal,
        )

    def __and__(self, other: "Geometry") -> "Geometry":
        self._require_equal(other, _TILES, "masks combine tile by tile: build both with one")
        limits = (self, other)
        # No causality is a prefix of everything: only true prefixes count.
        prefixes = [one.prefix_length for one in limits if one.is_causal]
        windows = [one.window_size for one in limits if one.window_size is not None]
        return dataclasses.replace(
            self,
            is_causal=bool(prefixes),
            window_size=min(windows, default=None),
            prefix_length=min(prefixes, default=0),
            is_anticausal=self.is_anticausal or other.is_anticausal,
        )

    def __or__(self, other: "Geometry") -> "Geometry":
        self._require_equal(other, _TILES, "masks combine tile by tile: build both with one")
        limits = ("is_causal", "window_size", "prefix_length", "is_anticausal")
        self._require_equal(other, limits, "a | b has one set of limits: build both with it")
        return self

    def _require_equal(self, other: "Geometry", names: tuple[str, ...], fix: str) -> None:
        for name in names:
            one, two = getattr(self, name), getattr(other, name)
            if one != two:
                raise ValueError(f"{name}={one} on the left, {name}={two} on the right; {fix}")
