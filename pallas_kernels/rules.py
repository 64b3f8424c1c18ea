"""Closed-form sparsity rules over blocks of tokens: dense, local and strided.

A rule answers one question, "may pattern head h let query block m see key block n?",
for arrays of heads and blocks that broadcast against each other. It never sees a
token: causality, a prefix, windows and lengths are added by `BlockMask`.
"""

import dataclasses
from collections.abc import Hashable
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Integer

from pallas_kernels.checks import check_integer, shown

Indices = Integer[np.ndarray, "..."] | Integer[jax.Array, "..."]
Visible = Bool[np.ndarray, "..."] | Bool[jax.Array, "..."] | np.bool_


@runtime_checkable
class Rule(Hashable, Protocol):
    """What `BlockMask.from_rule` asks of a rule.

    Write a frozen dataclass with these members to add a pattern of your own.
    """

    @property
    def block_size(self) -> int | None:
        """Tokens in a block; None when every block size gives the same mask."""

    @property
    def pattern_heads(self) -> int:
        """Rows of the pattern: 1, the key/value heads or the query heads."""

    def visible(self, head: Indices, query_block: Indices, key_block: Indices) -> Visible:
        """Returns True where query_block may see key_block in pattern row head.

        The arguments broadcast against each other, and the answer to their shape.
        Blocks are counted from the first key token, so query blocks may be negative.
        """


def check_rule(rule: object) -> None:
    """Raises ValueError unless rule is a `Rule`."""
    if isinstance(rule, type) or not isinstance(rule, Rule):
        raise ValueError(f"rule is {shown(rule)}: pass Dense(), Local(..), Strided(..) or a Rule")


@dataclasses.dataclass(frozen=True)
class Dense:
    """Every block sees every block: full attention, on the path of the sparse rules."""

    @property
    def block_size(self) -> None:
        """None: the rule has no blocks."""

    @property
    def pattern_heads(self) -> int:
        """One pattern for all heads."""
        return 1

    def visible(self, head: Indices, query_block: Indices, key_block: Indices) -> Visible:
        """Returns True."""
        del head, query_block, key_block
        return np.True_


@dataclasses.dataclass(frozen=True)
class Local:
    """Blocks near the diagonal: m - n < left and n - m < right.

    Under causality, left=1 is the "block" span of MASFormer (arXiv 2310.12442) and
    left=2 adds the preceding block.

    Attributes:
        block_size: tokens in a block.
        left: blocks looking back, the query's own counted.
        right: blocks looking ahead, the query's own counted; idle under causality.

    Raises:
        ValueError: a field is not a positive integer.
    """

    block_size: int
    left: int = 1
    right: int = 1

    def __post_init__(self) -> None:
        for name in ("block_size", "left", "right"):
            check_integer(name, getattr(self, name))

    @property
    def pattern_heads(self) -> int:
        """One pattern for all heads."""
        return 1

    def visible(self, head: Indices, query_block: Indices, key_block: Indices) -> Visible:
        """Returns m - n < left and n - m < right."""
        del head
        distance = query_block - key_block
        return (distance < self.left) & (-distance < self.right)


@dataclasses.dataclass(frozen=True)
class Strided:
    """A local band plus vertical stripes whose phase slides with the head.

    S2-Attention (arXiv 2407.17678) as its kernel library DKernel defines it. Pattern
    head h lets query block m see key block n when m - n < left and n - m < right, or

        absolute:  (n + h * step + offset) mod stride = 0
        relative:  (max(0, m-n-left+1) + max(0, n-m-right+1)) mod stride = 0

    DKernel takes "relative" for bidirectional attention unless told otherwise, and
    phase_by="kv_head" when it is given key/value heads. Phi-3-small is offset=1.

    Attributes:
        block_size: tokens in a block.
        stride: blocks from one stripe to the next.
        num_heads: query heads N.
        num_kv_heads: key/value heads K; None means N.
        left: local blocks looking back, the query's own counted.
        right: local blocks looking ahead, the query's own counted; idle under
            causality.
        offset: added to the phase of every head, in blocks.
        step: phase from one head to the next; None means max(1, stride // N).
        dense_heads: this many of the last pattern heads see everything.
        homo_head: all heads share the pattern of head 0.
        phase_by: h counts query heads, or key/value heads (one pattern per group).
        stripes: where the stripes stand, see above.

    Raises:
        ValueError: a field is out of range, K does not divide N, or homo_head is
            combined with dense_heads.
    """

    block_size: int
    stride: int
    num_heads: int
    num_kv_heads: int | None = None
    left: int = 1
    right: int = 1
    offset: int = 0
    step: int | None = None
    dense_heads: int = 0
    homo_head: bool = False
    phase_by: Literal["q_head", "kv_head"] = "q_head"
    stripes: Literal["absolute", "relative"] = "absolute"

    def __post_init__(self) -> None:
        for name in ("block_size", "stride", "num_heads", "left", "right"):
            check_integer(name, getattr(self, name))
        check_integer("offset", self.offset, least=None)
        check_integer("dense_heads", self.dense_heads, least=0)
        if self.num_kv_heads is not None:
            check_integer("num_kv_heads", self.num_kv_heads)
        if self.step is not None:
            check_integer("step", self.step, least=0)
        _require_choice("phase_by", self.phase_by, ("q_head", "kv_head"))
        _require_choice("stripes", self.stripes, ("absolute", "relative"))
        kv_heads = self.num_kv_heads
        if kv_heads is not None and self.num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={kv_heads} must divide num_heads={self.num_heads}")
        if self.dense_heads > self._counted_heads:
            raise ValueError(
                f"dense_heads={self.dense_heads} must be from 0 to the "
                f"{self._counted_heads} heads that phase_by={self.phase_by!r} counts"
            )
        if self.homo_head and self.dense_heads:
            raise ValueError(
                f"dense_heads={self.dense_heads} needs a pattern per head: set homo_head=False"
            )

    @property
    def _counted_heads(self) -> int:
        if self.phase_by == "kv_head" and self.num_kv_heads is not None:
            return self.num_kv_heads
        return self.num_heads

    @property
    def pattern_heads(self) -> int:
        """1 when all heads agree, else the number of heads that `phase_by` counts."""
        all_agree = self.stripes == "relative" and not self.dense_heads
        return 1 if self.homo_head or all_agree else self._counted_heads

    def visible(self, head: Indices, query_block: Indices, key_block: Indices) -> Visible:
        """Returns local or striped or dense, see the class."""
        ahead = query_block - key_block
        local = (ahead < self.left) & (-ahead < self.right)
        if self.stripes == "relative":
            before, after = ahead - self.left + 1, -ahead - self.right + 1
            stripe = before.clip(0) + after.clip(0)
        else:
            default_step = max(1, self.stride // self.num_heads)
            step = default_step if self.step is None else self.step
            stripe = key_block + head * step + self.offset
        dense = head >= self.pattern_heads - self.dense_heads
        return local | (stripe % self.stride == 0) | dense


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {choices}")
