"""Which blocks of keys rows attend to: how many, which always, and those of the highest scores."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparseformer_jax.attention import _block_choice
from sparseformer_jax.attention._gate_scores import Scored
from sparseformer_jax.attention._gates import GateOptions

_CHOICES = ("density", "threshold", "token_budget")
_DENSITIES = (0.1, 0.2, 0.3, 0.5)


@dataclasses.dataclass(frozen=True)
class SelectionOptions(GateOptions):
    """How many blocks a row keeps, beside what gates are made of.

    Attributes:
      density: of all pairs, kept by as many blocks for each block of queries; "prefill" only.
        This and the next two choose in evaluation, one of them; none: attention is dense.
      threshold: on a block's share, the softmax of the gate's scores.
      token_budget: keys that a query sees at most, in whole blocks, its own counted.
      keeps_first: the first block of a document is always kept.
      dense_rows: the last blocks of queries that attend densely; the release has 2.
      capacity: most blocks that `threshold` keeps for a row, the best; None: any number.
      selector: what scores blocks in evaluation: "gate"; to compare it with, "oracle" is what it
        learns from, which costs dense attention, "mean_pooled" products of average queries and
        keys, and "recent" the order of blocks, the last first.
    """

    density: float | None = None
    threshold: float | None = None
    token_budget: int | None = None
    keeps_first: bool = False
    dense_rows: int = 0
    capacity: int | None = None
    selector: Literal["gate", "oracle", "mean_pooled", "recent"] = "gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"{n}={getattr(self, n)}" for n in _CHOICES if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: each chooses blocks in its own way; set one")
        for name in ("density", "threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be above 0 and at most 1")
        least = self.block_size * (1 + self.keeps_first)
        if self.token_budget is not None and self.token_budget < least:
            raise ValueError(
                f"token_budget={self.token_budget} must be at least {least}, what is always kept"
            )
        if self.capacity is not None and (self.threshold is None or self.capacity < 2):
            raise ValueError(f"capacity={self.capacity} bounds a threshold, and by at least 2")
        if self.gates == "decode" and (self.density is not None or self.dense_rows):
            raise ValueError(
                "gates='decode' has no density and no dense_rows; set threshold or token_budget"
            )
        if self.dense_rows < 0:
            raise ValueError(f"dense_rows={self.dense_rows} must not be negative")

    @property
    def chooses(self) -> bool:
        """Whether attention is sparse in evaluation."""
        return any(getattr(self, name) is not None for name in _CHOICES)

    def most_blocks(self, num_blocks: int) -> int:
        """Returns how many blocks a row keeps at most, its own counted."""
        if self.token_budget is not None:
            return min(self.token_budget // self.block_size, num_blocks)
        if self.density is not None:
            count = _block_choice.count_of_density(self.density, num_blocks)
            return min(max(count, 1 + self.keeps_first), num_blocks)
        return min(self.capacity or num_blocks, num_blocks)


def sweep(options: SelectionOptions, seq_len: int) -> list[dict[str, Any]]:
    """Returns options that attend to more and more of a sequence; the last are dense."""
    dense = dict.fromkeys((*_CHOICES, "capacity"))
    if options.gates == "prefill":
        return [*(dense | {"density": x} for x in _DENSITIES), dense]
    size = options.block_size
    least = size * (1 + options.keeps_first)
    budgets = {max(least, int(x * seq_len) // size * size) for x in _DENSITIES}
    return [*(dense | {"token_budget": x} for x in sorted(budgets)), dense]


def choose(options: SelectionOptions, scored: Scored) -> tuple[jax.Array, jax.Array]:
    """Returns which blocks rows attend to [B, n, M, J], and which would have more [B, n, M].

    Nothing of it has a gradient.

    Args:
      options: how many.
      scored: the rows.
    """
    scores = jax.lax.stop_gradient(scored.scores)
    past, own, num_blocks = scored.past, scored.own, scores.shape[-1]
    forced = jnp.broadcast_to(own, (len(past), *own.shape[1:]))
    if options.keeps_first:
        is_first = jnp.cumsum(past, axis=-1) == 1
        forced = forced | (past & is_first)
    free = past & ~forced
    # The most that any row forces is 2: at the first block both are one.
    forced_count = 1 + options.keeps_first
    count, counts = options.most_blocks(num_blocks) - forced_count, None
    first = jnp.asarray(num_blocks - options.dense_rows)
    if scored.num_blocks is not None:
        # Made on the host: density is rounded as for whole sequences.
        most = np.array([options.most_blocks(n) for n in range(num_blocks + 1)], np.int32)
        counts = jnp.asarray(most)[scored.num_blocks] - forced_count
        first = (scored.num_blocks - options.dense_rows)[:, None, None, None]
    overflow = jnp.zeros(scores.shape[:-1], bool)
    if options.threshold is not None:
        seen = past | own if options.gates == "prefill" else past
        above = free & _block_choice.above(scores, seen, options.threshold)
        overflow = jnp.sum(above, axis=-1) > count
        free = above
    chosen = forced | _block_choice.highest(scores, free, count, counts)
    if options.dense_rows:
        is_dense = jnp.any(own & (jnp.arange(num_blocks) >= first), axis=-1, keepdims=True)
        chosen = chosen | (past & is_dense)
    return chosen, overflow
