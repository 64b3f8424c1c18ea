"""Checks the arguments of `block_sparse_attention`, each mistake told in one line."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.checks import check_heads


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
    _check_segments(query, key, segment_ids)
    block_mask = block_mask.tightened(is_causal, window_size, query_offset)
    scores = Scores(query.shape[-1] ** -0.5 if scale is None else scale, logits_soft_cap)
    return Call(query, key, value, block_mask, segment_ids, scores, return_lse)


def _check_arrays(query: Array, key: Array, value: Array) -> None:
    check_heads(query, key)
    for name, array in {"query": query, "key": key, "value": value}.items():
        if array.dtype != query.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {array.dtype}, query {query.dtype}: cast query, key and "
                "value to one floating dtype"
            )
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}, key {key.shape}: pass equal shapes")


def _check_mask(query: Array, key: Array, block_mask: BlockMask) -> None:
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


def _check_segments(query: Array, key: Array, segment_ids: tuple[Array, Array] | None) -> None:
    if segment_ids is None:
        return
    shapes = (query.shape[:2], key.shape[:2])
    given = [(ids.shape, jnp.issubdtype(ids.dtype, jnp.integer)) for ids in segment_ids]
    if given != [(shape, True) for shape in shapes]:
        listed = ", ".join(f"{ids.dtype}{list(ids.shape)}" for ids in segment_ids)
        raise ValueError(
            f"segment_ids are ({listed}): pass integers (query {list(shapes[0])}, key "
            f"{list(shapes[1])})"
        )
