"""What an implementation is asked to compute, and how many implementations there are."""

import dataclasses
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.geometry import Geometry
from pallas_kernels.selection import Implementations
from pallas_kernels.targets import Target

IMPLEMENTATIONS = Implementations(
    "pallas_kernels.block_max", ("pallas_tpu", "mosaic_gpu", "triton", "xla", "reference")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The checked arguments of `block_max_attention`, defaults filled in.

    Attributes:
        query: queries.
        key: keys.
        lse: log-sum-exp of each row in float32 or wider, +inf where a row sees nothing:
            then exp(s - lse) is 0 in such a row, and never NaN.
        segment_ids: of queries and keys, if given.
        query_offset: position of the first query.
        geometry: lengths, block sizes, causality and window.
        scores: scale and soft cap; the scale is positive, so that logits grow with the
            raw products and the largest product has the largest logit.
        over_group: whether to take the maximum over the query heads of a key head.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    lse: Float[Array, "B T N"]
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
    query_offset: Int[Array, ""]
    geometry: Geometry
    scores: Scores
    over_group: bool

    @property
    def group(self) -> int:
        """N / K."""
        return self.query.shape[2] // self.key.shape[2]


@runtime_checkable
class Implementation(Protocol):
    """What a module of `IMPLEMENTATIONS` defines."""

    def refusal(self, call: Call, target: Target) -> str | None:
        """Returns why it cannot compute the call there; None when it can."""

    def block_max(self, call: Call, target: Target) -> Float[Array, "B n M J"]:
        """Returns the maxima in the dtype of lse; n is K when `over_group`, else N."""
