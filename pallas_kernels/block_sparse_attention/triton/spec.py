"""What the Triton kernels know at compile time."""

import dataclasses
import math

from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.geometry import Geometry
from pallas_kernels.kernel_tables import Tiling

_LOG2_E = math.log2(math.e)
_LEAST_WIDTH = 16  # of a product on tensor cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductSpec:
    """How products of queries and keys become logits.

    A spec is hashable and compared by value: a kernel is compiled once for each.

    Attributes:
        scores: scale and soft cap.
        head_dim: H.
        precision: of products of float32 numbers, as `tl.dot` calls it.
    """

    scores: Scores
    head_dim: int
    precision: str

    @property
    def head_width(self) -> int:
        """H, up to the power of two that a tile needs."""
        return max(_LEAST_WIDTH, 1 << (self.head_dim - 1).bit_length())

    @property
    def scale(self) -> float:
        """The slope of logits over raw products, where nothing caps them."""
        return self.scores.scale

    @property
    def is_capped(self) -> bool:
        """Logits pass through tanh."""
        return self.scores.soft_cap is not None

    @property
    def slant(self) -> float:
        """What multiplies raw products at once; 1 when `factor` does it all."""
        if self.scores.soft_cap is not None:
            return self.scale / self.scores.soft_cap
        return 1.0 if self.scale > 0 else self.scale

    @property
    def factor(self) -> float:
        """What is left to multiply on the way to base-2 logits: positive, so that the
        largest of a row stays the largest.
        """
        if self.scores.soft_cap is not None:
            return self.scores.soft_cap * _LOG2_E
        return self.scale * _LOG2_E if self.scale > 0 else _LOG2_E


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(ProductSpec):
    """Shapes, limits and scores of one attention kernel.

    Attributes:
        tiling: tiles and granules in tokens.
        geometry: lengths before padding, and limits on pairs.
        queries: T, padded.
        keys: S, padded.
        heads: N.
        kv_heads: K.
        lists: (b, Hp, M, C), the shape of the lists.
        offsets_have_batch: each batch entry has its own query offset.
        has_segments: segment ids are given.
    """

    tiling: Tiling
    geometry: Geometry
    queries: int
    keys: int
    heads: int
    kv_heads: int
    lists: tuple[int, ...]
    offsets_have_batch: bool
    has_segments: bool

    @property
    def query_tile(self) -> int:
        """Tokens in a query tile."""
        return self.tiling.query_tile

    @property
    def key_tile(self) -> int:
        """Tokens in a key tile."""
        return self.tiling.key_tile

    @property
    def query_granule(self) -> int:
        """Tokens in a query granule."""
        return self.tiling.query_granule

    @property
    def key_granule(self) -> int:
        """Tokens in a key granule."""
        return self.tiling.key_granule

    @property
    def key_granules(self) -> int:
        """Granules in a key tile."""
        return self.tiling.key_granules

    @property
    def group(self) -> int:
        """Query heads that read a key/value head."""
        return self.heads // self.kv_heads

    @property
    def query_tiles(self) -> int:
        """M."""
        return self.queries // self.query_tile

    @property
    def key_tiles(self) -> int:
        """J."""
        return self.keys // self.key_tile

    @property
    def query_step(self) -> int:
        """Numbers from one query tile to the next."""
        return self.query_tile * self.heads * self.head_dim

    @property
    def key_step(self) -> int:
        """Numbers from one key tile to the next."""
        return self.key_tile * self.kv_heads * self.head_dim

    @property
    def lists_have_batch(self) -> bool:
        """Each batch entry has its own lists."""
        return self.lists[0] > 1

    @property
    def patterns(self) -> int:
        """Hp."""
        return self.lists[1]

    @property
    def heads_per_pattern(self) -> int:
        """Query heads that share a list."""
        return self.heads // self.patterns

    @property
    def list_rows(self) -> int:
        """M: lists of a pattern."""
        return self.lists[2]

    @property
    def capacity(self) -> int:
        """C: room for entries in a list."""
        return self.lists[3]

    @property
    def keys_are_ragged(self) -> bool:
        """The last key tile sticks out."""
        return self.visible_keys % self.key_tile != 0

    @property
    def visible_keys(self) -> int:
        """S, before padding."""
        return self.geometry.key_length

    @property
    def is_causal(self) -> bool:
        """Pairs have j <= i, but for those in the prefix."""
        return self.geometry.is_causal

    @property
    def is_limited(self) -> bool:
        """Positions hide pairs."""
        return self.is_causal or self.has_most

    @property
    def has_most(self) -> bool:
        """Something bounds i - j from above."""
        return self.geometry.is_anticausal or self.geometry.window_size is not None

    @property
    def least(self) -> int:
        """Smallest i - j of a visible pair outside the prefix."""
        return self.geometry.reach[0]

    @property
    def most(self) -> int:
        """Largest i - j of a visible pair."""
        return self.geometry.reach[1]

    @property
    def prefix_length(self) -> int:
        """Keys that causality does not hide."""
        return self.geometry.prefix_length

    @property
    def prefix_least(self) -> int:
        """Smallest i - j of a visible pair in the prefix."""
        return self.geometry.prefix_least
