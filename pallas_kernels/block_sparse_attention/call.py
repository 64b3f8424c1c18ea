"""What an implementation is asked to compute."""

import dataclasses

from jaxtyping import Array, Float, Int

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.scores import Scores


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The checked arguments of `block_sparse_attention`, defaults filled in.

    Attributes:
        query: queries.
        key: keys.
        value: values.
        block_mask: the pattern, under the limits of this call.
        segment_ids: of queries and keys, if given. Keys that `pallas_tpu` has gathered
            have ids for each of their heads.
        scores: scale and soft cap.
        return_lse: whether the log-sum-exp is used.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    block_mask: BlockMask
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B *K S"]] | None
    scores: Scores
    return_lse: bool

    @property
    def heads_with_one_list(self) -> int:
        """N / max(K, Hp): neighbouring query heads with the same keys, values and pattern."""
        patterns = self.block_mask.kv_counts.shape[-2]
        return self.query.shape[2] // max(self.key.shape[2], patterns)
