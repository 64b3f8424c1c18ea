"""The public function: it checks its arguments and picks an implementation."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles
from pallas_kernels.block_max.call import IMPLEMENTATIONS, Call, Implementation
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.checks import check_array, check_dtypes, check_heads, check_segments
from pallas_kernels.geometry import Geometry

SegmentIds = tuple[Int[Array, "B T"], Int[Array, "B S"]]


def block_max_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float[Array, "B T N"],
    *,
    query_block_size: int | None,
    key_block_size: int,
    is_causal: bool,
    window_size: int | None = None,
    prefix_length: int = 0,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    query_offset: tiles.Offset | None = None,
    group_reduction: Literal["max"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B n M J"]:
    """Returns the largest attention weight of each block, from a saved log-sum-exp.

        out_mj = max exp(s_ij' - lse_i),  s_ij' = scale * (q_i . k_j')

    over the rows i of query block m and the keys j' of key block j that they see; 0
    where they see none. This is the target that the gates of SeerAttention learn (arXiv
    2410.13276, "ground truth": the 2-D maximum-pooled attention map) and, row by row,
    those of SeerAttention-R (arXiv 2506.08889, its 1-D counterpart, maximum over the
    group). Nothing of size T x S exists: the scores are computed a second time, in tiles.

    What the released code does next is left to the caller. For prefill it divides each
    row of blocks by its sum over j. For decoding it sets to 0 the blocks that do not
    lie before the row's own, j >= i // key_block_size, and then divides by the sum over
    j plus 1e-9.

    It is a target: no gradient flows into query, key or lse.

    Args:
        query: N heads, a multiple of K; head n reads key head n // (N / K).
        key: keys in K heads.
        lse: what `block_sparse_attention(..., return_lse=True)` gives under the same
            limits, scale and cap. Rows with -inf see nothing. Where its block_mask left
            blocks out, weights are relative to the ones it kept and may exceed 1.
        query_block_size: queries in a block, counted from the first; the last may be
            ragged. None keeps rows apart: M = T.
        key_block_size: keys in a block, counted from the first; the last may be ragged.
        is_causal: keep j' <= i, with i counted from query_offset.
        window_size: keep |i - j'| < window_size.
        prefix_length: keys that causality does not hide: keep j' < prefix_length too.
        segment_ids: integers for queries and for keys; keep pairs with equal ones.
        scale: None means 1 / sqrt(H).
        logits_soft_cap: c > 0 in s <- c * tanh(s / c).
        query_offset: position of the first query, may be traced. None means S - T.
        group_reduction: "max" for the maximum over the query heads of each key head.
        implementation: "pallas_tpu", "mosaic_gpu", "triton", "xla" or "reference", several
            to try in order, or None for the best one that can run.

    Returns:
        [B, n, M, J] with n = N, or K under group_reduction; M = ceil(T /
        query_block_size) and J = ceil(S / key_block_size). float32, or float64 for
        float64 inputs.

    Raises:
        ValueError: arguments do not fit together, or implementation is unknown.
        NotImplementedError: no implementation asked for can run; says why.
    """
    _check_arrays(query, key, lse)
    check_segments(query, key, segment_ids)
    if group_reduction not in (None, "max"):
        raise ValueError(f"group_reduction={group_reduction!r} must be 'max' or None")
    scores = Scores(query.shape[-1] ** -0.5 if scale is None else scale, logits_soft_cap)
    if scores.scale <= 0:
        raise ValueError(f"scale={scale} must be positive")
    geometry = Geometry(
        query.shape[1],
        key.shape[1],
        1 if query_block_size is None else query_block_size,
        key_block_size,
        is_causal,
        window_size,
        prefix_length,
    )
    offset = geometry.default_offset if query_offset is None else query_offset
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    call = Call(
        query,
        key,
        _usable(lse, query.dtype),
        segment_ids,
        jnp.asarray(tiles.as_scalar(offset)),
        geometry,
        scores,
        group_reduction == "max",
    )
    choice = IMPLEMENTATIONS.choose(call, implementation)
    module: Implementation = IMPLEMENTATIONS.load(choice.required())
    return module.block_max(call, choice.target)


def _usable(lse: Array, dtype: jnp.dtype) -> Array:
    """Returns lse as `Call` wants it."""
    lse = lse.astype(jnp.promote_types(dtype, jnp.float32))
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def _check_arrays(query: Array, key: Array, lse: Array) -> None:
    check_heads(query, key)
    check_dtypes(query=query, key=key)
    check_array("lse", lse)
    if lse.shape != query.shape[:3] or not jnp.issubdtype(lse.dtype, jnp.floating):
        raise ValueError(
            f"lse is {lse.dtype}{list(lse.shape)}, query has shape {query.shape}: pass "
            f"floats {list(query.shape[:3])}"
        )
