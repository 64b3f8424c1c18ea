"""DSnoT (Zhang et al. 2023, arXiv 2310.08915): exchanges weights of a mask, without training.

Of each output, e = sum over dropped weights of w E[sum over tokens of x] is what its mean lacks.
A cycle revives the dropped weight that lowers |e| most, by its part w E[x] / var(x)^a, and drops a
kept one: of a kept fraction the one of least |w| ||x|| that lowers |e| too, of n:m the one of least
score in the same group. An output is left as it is once |e| is at most `threshold`, a move would
turn the sign of e, or there is nothing to exchange, where the released code takes weights back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax.sparsity import nm
from sparseformer_jax.sparsity._selection import AnyPattern, Unstructured
from sparseformer_jax.sparsity._statistics import Statistics


class _State(NamedTuple):
    """Of the loop.

    Attributes:
      cycle: how many were.
      active: whether an output goes on.
      error: e.
      mask: as it is.
      revived: how many of each list of candidates came back.
      dropped: likewise, how many went; of n:m unused.
      droppable: which weights may still go, of n:m.
    """

    cycle: Int[Array, ""]
    active: Bool[Array, " O"]
    error: Float[Array, " O"]
    mask: Bool[Array, "I O"]
    revived: Int[Array, "2 O"]
    dropped: Int[Array, "2 O"]
    droppable: Bool[Array, "I O"]


class _Lists(NamedTuple):
    """Inputs in the order in which they are taken, for e <= 0 and for e > 0, and how many."""

    order: Int[Array, "2 I O"]
    lengths: Int[Array, "2 O"]

    @classmethod
    def of(cls, ranks: Float[Array, "2 I O"], listed: Bool[Array, "2 I O"]) -> "_Lists":
        """Returns the listed inputs by rank, the least first."""
        order = jnp.argsort(jnp.where(listed, ranks, jnp.inf), axis=1, stable=True)
        return cls(order, jnp.sum(listed, axis=1))

    def next(
        self, side: Int[Array, " O"], taken: Int[Array, "2 O"]
    ) -> tuple[Int[Array, " O"], Bool[Array, " O"]]:
        """Returns each output's next input on a side, and whether there is one."""
        outputs = jnp.arange(len(side))
        place = taken[side, outputs]
        there_is = place < self.lengths[side, outputs]
        return self.order[side, jnp.where(there_is, place, 0), outputs], there_is


def refine(
    weight: Float[Array, "I O"],
    statistics: Statistics,
    mask: Bool[Array, "I O"],
    scores: Float[Array, "I O"],
    pattern: AnyPattern,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1,
    variance_power: float = 1.0,
    keeps_sign: bool | None = None,
) -> Bool[Array, "I O"]:
    """Returns the mask with weights exchanged; each output, or each group, keeps as many.

    Args:
      weight: W.
      statistics: of the inputs.
      mask: which weights are kept.
      scores: those the mask was made by; n:m drops by them.
      pattern: of the mask.
      max_cycles: exchanges of an output at most.
      threshold: of |e|, which is a sum over the tokens of a sample.
      variance_power: a; 0: candidates are not divided by the variance.
      keeps_sign: whether a move that turns the sign of e is left out; None, as released: of n:m.
    """
    keeps_sign = isinstance(pattern, nm.Pattern) if keeps_sign is None else keeps_sign
    weight = weight.astype(jnp.float32)
    parts = weight * statistics.mean_sum[:, None]
    # An input that is constant within samples comes first; one that is zero never does.
    variance = jnp.power(statistics.variance, variance_power)[:, None]
    gains = jnp.where(parts == 0, 0, parts / variance)
    falls = jnp.stack([gains, -gains])  # on the side of its sign the largest first
    growing = _Lists.of(falls, ~mask & (falls < 0))
    importance = jnp.abs(weight) * jnp.sqrt(statistics.mean_square)[:, None]
    signs = jnp.stack([parts > 0, parts < 0])
    shrinking = _Lists.of(jnp.broadcast_to(importance, signs.shape), mask & signs)
    error = jnp.sum(jnp.where(mask, 0, parts), axis=0)
    sign = jnp.sign(error)
    outputs = jnp.arange(len(error))

    def goes_on(state: _State) -> Bool[Array, ""]:
        return jnp.any(state.active) & (state.cycle < max_cycles)

    def exchange(state: _State) -> _State:
        side = (state.error > 0).astype(jnp.int32)
        new, may_grow = growing.next(side, state.revived)
        if isinstance(pattern, Unstructured):
            old, may_shrink = shrinking.next(side, state.dropped)
        else:
            old, may_shrink = _least_of_group(scores, state.droppable, new, pattern.m)
        error = state.error + parts[old, outputs] - parts[new, outputs]
        moves = state.active & may_grow & may_shrink & (jnp.abs(state.error) > threshold)
        if keeps_sign:
            moves &= jnp.sign(error) == sign
        swapped = state.mask.at[new, outputs].max(moves).at[old, outputs].min(~moves)
        return _State(
            state.cycle + 1,
            moves,
            jnp.where(moves, error, state.error),
            swapped,
            state.revived.at[side, outputs].add(1),
            state.dropped.at[side, outputs].add(1),
            state.droppable.at[old, outputs].min(~moves),
        )

    none = jnp.zeros((2, len(error)), jnp.int32)
    start = _State(jnp.int32(0), jnp.ones_like(error, bool), error, mask, none, none, mask)
    return jax.lax.while_loop(goes_on, exchange, start).mask


def _least_of_group(
    scores: Float[Array, "I O"], droppable: Bool[Array, "I O"], new: Int[Array, " O"], m: int
) -> tuple[Int[Array, " O"], Bool[Array, " O"]]:
    """The droppable input of least score in the group of a new one, and whether there is one."""
    members = new // m * m + jnp.arange(m)[:, None]
    outputs = jnp.arange(len(new))
    may_go = droppable[members, outputs]
    ranks = jnp.where(may_go, scores[members, outputs], jnp.inf)
    return members[jnp.argmin(ranks, axis=0), outputs], jnp.any(may_go, axis=0)
