"""The public function: it checks its arguments and picks an implementation."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import selection
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.block_sparse_attention.selection import Choice

SegmentIds = tuple[Int[Array, "B T"], Int[Array, "B S"]]
Output = Float[Array, "B T N H"]
LogSumExp = Float[Array, "B T N"]


def block_sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    block_mask: BlockMask,
    *,
    is_causal: bool,
    window_size: int | None = None,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    query_offset: tiles.Offset | None = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
) -> Output | tuple[Output, LogSumExp]:
    """Attends within the tiles that block_mask lists.

        out_i = sum_j softmax_j(s_ij) v_j,  s_ij = scale * (q_i . k_j)

    over the keys j visible to query i: their tile is listed, the rule of block_mask
    allows the pair, and so do causality, window and segments. A query that sees no key
    gets out 0, gradient 0 and lse -inf. Logits, softmax and sums are float32, or
    float64 for float64 inputs. Differentiable in query, key and value, through both
    outputs.

    Args:
        query: N heads, a multiple of K; head n reads key/value head n // (N / K).
        key: keys in K heads.
        value: values, shaped like the keys.
        block_mask: the pattern; it has 1, K or N pattern heads.
        is_causal: keep j <= i, with i counted from query_offset.
        window_size: keep |i - j| < window_size.
        segment_ids: integers for queries and for keys; keep pairs with equal ones.
        scale: None means 1 / sqrt(H).
        logits_soft_cap: c > 0 in s <- c * tanh(s / c).
        query_offset: position of the first query, may be traced. None means that of
            block_mask, which is S - T unless it was built with another.
        implementation: "pallas_tpu", "cudnn", "mosaic_gpu", "triton", "xla" or
            "reference", several to try in order, or None for the best one that can run;
            `explain` tells which that is.
        return_lse: also return log sum_j exp(s_ij), the natural logarithm, in float32
            or wider.

    Returns:
        out in the dtype of query, or (out, lse).

    Raises:
        ValueError: arguments do not fit together, or implementation is unknown.
        NotImplementedError: no implementation asked for can run; says why.
    """
    call = _checked(
        query,
        key,
        value,
        block_mask,
        is_causal=is_causal,
        window_size=window_size,
        segment_ids=segment_ids,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        query_offset=query_offset,
        return_lse=return_lse,
    )
    choice = selection.choose(call, implementation)
    if choice.taken is None:
        raise NotImplementedError("; ".join(str(choice).splitlines()))
    out, lse = selection.load(choice.taken).attend(call, choice.target)
    return (out, lse) if return_lse else out


def explain(
    *arrays: Any, implementation: str | Sequence[str] | None = None, **options: Any
) -> Choice:
    """Returns which implementation `block_sparse_attention` takes, and why not others.

    Pass what you would pass to `block_sparse_attention`, and print the result. For
    arrays, what `jax.eval_shape` returns will do.

    Raises:
        ValueError: arguments do not fit together, or implementation is unknown.
    """
    return selection.choose(_checked(*arrays, **options), implementation)


def _checked(
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
    _check_arrays(query, key, value)
    _check_mask(query, key, block_mask)
    _check_segments(query, key, segment_ids)
    block_mask = block_mask.tightened(is_causal, window_size, query_offset)
    scores = Scores(query.shape[-1] ** -0.5 if scale is None else scale, logits_soft_cap)
    return Call(query, key, value, block_mask, segment_ids, scores, return_lse)


def _check_arrays(query: Array, key: Array, value: Array) -> None:
    for name, array in {"query": query, "key": key, "value": value}.items():
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}: pass [batch, length, heads, head_dim]"
            )
        if array.dtype != query.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {array.dtype}, query {query.dtype}: cast query, key and "
                "value to one floating dtype"
            )
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}, key {key.shape}: pass equal shapes")
    batch, _, num_heads, head_dim = query.shape
    if (key.shape[0], key.shape[3]) != (batch, head_dim) or num_heads % key.shape[2]:
        raise ValueError(
            f"key has shape {key.shape}, query {query.shape}: pass equal batch and "
            "head_dim, and key heads that divide the query heads"
        )


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
