"""The arithmetic of one tile on base-2 exponents: online softmax and its gradient.

Plain functions of arrays, for a warpgroup's registers as for a CPU.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import along_rows
from pallas_kernels.block_sparse_attention.scores import Scores

LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)
# Below any logit, and finite: lowest - lowest is no NaN in rows that see nothing.
LOWEST = -1e30


def raw_logits(scores: Scores, raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x, which `factor` turns into logits in base 2: x * factor = s * log2(e).

    Without a soft cap these are the raw products: scale and base then cost nothing, in
    one multiply-add with the subtraction of the peak.
    """
    if scores.soft_cap is not None:
        return scores.soft_cap * _tanh(raw * (scores.scale / scores.soft_cap))
    return raw if scores.scale > 0 else raw * scores.scale


def factor(scores: Scores) -> float:
    """Returns the factor of `raw_logits`, which is positive."""
    is_scaled = scores.soft_cap is not None or scores.scale <= 0
    return LOG2_E if is_scaled else scores.scale * LOG2_E


def _tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns tanh(x) to float32's absolute accuracy.

    The instruction for tanh keeps 11 bits, and IEEE division is slow: 1 / y for y >= 1
    is the square of 1 / sqrt(y).
    """
    root = lax.rsqrt(1 + jnp.exp2(x * (2 * LOG2_E)))
    return 1 - 2 * (root * root)


class Running(NamedTuple):
    """The state of the online softmax.

    Attributes:
        peak: the largest logit so far, in base 2.
        total: the sum of 2^(logit - peak) so far.
    """

    peak: Float[Array, "R"]
    total: Float[Array, "R"]

    def add(
        self, logits: Float[Array, "R C"], factor: float
    ) -> tuple["Running", Float[Array, "R"], Float[Array, "R C"]]:
        """Returns (state, shrink, weights) after a tile of x, -inf where masked.

        shrink is what sums so far must be multiplied by.
        """
        peak = jnp.maximum(self.peak, logits.max(axis=1) * factor)
        shrink = jnp.exp2(self.peak - peak)
        weights = jnp.exp2(logits * factor - along_rows(peak, logits.shape[1]))
        return Running(peak, self.total * shrink + weights.sum(axis=1)), shrink, weights

    def finish(self) -> tuple[Float[Array, "R"], Float[Array, "R"]]:
        """Returns (1 / total, lse): 1 and -inf in rows that see nothing."""
        is_empty = self.total == 0.0
        total = jnp.where(is_empty, 1.0, self.total)
        lse = self.peak * _LN_2 + jnp.log(total)
        return 1.0 / total, jnp.where(is_empty, -jnp.inf, lse)


def weights(
    scores: Scores, raw: Float[Array, "..."], lse: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns (x, exp(s - lse)) of raw products; lse is in base 2."""
    logits = raw_logits(scores, raw)
    return logits, jnp.exp2(logits * factor(scores) - lse)


def gradient(
    scores: Scores,
    logits: Float[Array, "R C"],
    weights: Float[Array, "R C"],
    d_weights: Float[Array, "R C"],
    shift: Float[Array, "R C"],
) -> Float[Array, "R C"]:
    """Returns the gradient of the raw products, but for the scale."""
    gradient = weights * (d_weights - shift)
    if scores.soft_cap is None:
        return gradient
    ratio = logits * (1 / scores.soft_cap)
    return gradient - gradient * (ratio * ratio)
