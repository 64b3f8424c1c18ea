"""Checks the arguments of `block_sparse_attention`, each mistake told in one line."""

from jaxtyping import Array

from pallas_kernels import tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.checks import check_array, check_dtypes, check_heads, check_segments


def checked(
    query: Array,
    key: Array,
    value: Array,
    block_mask: BlockMask,
    *,
    is_causal: bool,
    window_size: int | None = None,
    segment_ids: tuple[Array, Array] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    query_offset: tiles.Offset | None = None,
    return_lse: bool = False,
) -> Call:
    """Returns the arguments of `block_sparse_attention` as a call, defaults filled in.

    Raises:
        ValueError: they do not fit together; names the argument and both values.
    """
    _check_arrays(query, key, value)
    _check_mask(query, key, block_mask)
    check_segments(query, key, segment_ids)
    block_mask = block_mask.tightened(is_causal, window_size, query_offset)
    scores = Scores(query.shape[-1] ** -0.5 if scale is None else scale, logits_soft_cap)
    return Call(query, key, value, block_mask, segment_ids, scores, return_lse)


def _check_arrays(query: Array, key: Array, value: Array) -> None:
    check_heads(query, key)
    check_array("value", value)
    check_dtypes(query=query, key=key, value=value)
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}, key {key.shape}: pass equal shapes")


def _check_mask(query: Array, key: Array, block_mask: BlockMask) -> None:
    if not isinstance(block_mask, BlockMask):
        raise ValueError(
            f"block_mask is {type(block_mask).__name__}: pass a BlockMask, made by "
            "BlockMask.from_rule, from_block_map or from_top_k"
        )
    lengths = (query.shape[1], key.shape[1])
    built = (block_mask.query_length, block_mask.key_length)
    if lengths != built:
        raise ValueError(
            f"block_mask was built for {built[0]} queries and {built[1]} keys, but "
            f"there are {lengths[0]} and {lengths[1]}: build it for these lengths"
        )
    *batch, pattern_heads, _ = block_mask.kv_counts.shape
    choices = sorted({1, key.shape[2], query.shape[2]})
    if pattern_heads not in choices:
        raise ValueError(
            f"block_mask has {pattern_heads} pattern heads: these heads of query and "
            f"key need one of {choices}"
        )
    if batch and batch[0] not in (1, query.shape[0]):
        raise ValueError(
            f"block_mask has batch {batch[0]}, query has {query.shape[0]}: build it "
            "for that batch, or for 1"
        )
