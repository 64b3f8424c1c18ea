"""The public functions: attention by the best implementation, and which one that is."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import selection
from pallas_kernels.block_sparse_attention.arguments import checked
from pallas_kernels.block_sparse_attention.selection import IMPLEMENTATIONS
from pallas_kernels.selection import Choice

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
    outputs. Keys and values that a query does not see change nothing as long as they and
    their products are finite: the weight of 0 that they get makes NaN of infinity.

    Heads of up to 256 run on the hardware kernels: `pallas_tpu` computes them as they are,
    `mosaic_gpu` padded to a multiple of 64, `triton` in the next power of two.

    Args:
        query: N heads, a multiple of K; head n reads key/value head n // (N / K).
        key: keys in K heads.
        value: values, shaped like the keys.
        block_mask: the pattern; it has 1, K or N pattern heads.
        is_causal: keep j <= i, with i counted from query_offset, and the prefix of
            block_mask if it has one.
        window_size: keep |i - j| < window_size.
        segment_ids: integers for queries and for keys; keep pairs with equal ones.
        scale: None means 1 / sqrt(H).
        logits_soft_cap: c > 0 in s <- c * tanh(s / c).
        query_offset: position of the first query, may be traced. None means that of
            block_mask, which is S - T unless it was built with another.
        implementation: "pallas_tpu", "cudnn", "mosaic_gpu", "triton", "xla" or
            "reference", several to try in order, or None for the best one that can run;
            `explain` tells which that is. "cudnn" is taken by name only, as its gradients
            change from run to run, unless XLA_FLAGS ask for deterministic operations.
        return_lse: also return log sum_j exp(s_ij), the natural logarithm, in float32
            or wider.

    Returns:
        out in the dtype of query, or (out, lse).

    Raises:
        ValueError: arguments do not fit together, or implementation is unknown.
        NotImplementedError: no implementation asked for can run; says why.
    """
    call = checked(
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
    choice = IMPLEMENTATIONS.choose(call, implementation)
    out, lse = selection.load(choice.required()).attend(call, choice.target)
    return (out, lse) if return_lse else out


def explain(
    query: Any,
    key: Any,
    value: Any,
    block_mask: BlockMask,
    *,
    segment_ids: Any = None,
    implementation: str | Sequence[str] | None = None,
    **options: Any,
) -> Choice:
    """Returns which implementation `block_sparse_attention` takes, and why not others.

    Pass what you would pass to `block_sparse_attention`, and print the result. Nothing
    is computed: `jax.ShapeDtypeStruct` will do for arrays.

    Raises:
        ValueError: arguments do not fit together, or implementation is unknown.
    """
    choices = []

    def choose(query: Array, key: Array, value: Array, segment_ids: SegmentIds | None) -> None:
        call = checked(query, key, value, block_mask, segment_ids=segment_ids, **options)
        choices.append(IMPLEMENTATIONS.choose(call, implementation))

    jax.eval_shape(choose, query, key, value, segment_ids)
    return choices[0]
