"""The loops of the xla implementation, over rows of query tiles (layout: `rows`).

Letters: R rows of Q queries, U key tiles of P keys, L rows computed together.
"""

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import precision, tiles
from pallas_kernels.block_sparse_attention.rows import Lists
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.rules import Rule

_Tree = TypeVar("_Tree")
_Carry = tuple[Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static; `lanes` rows of different programs are computed together.

    On a CPU it is `cpu_lanes`.
    """

    geometry: tiles.Geometry
    rule: Rule | None
    scores: Scores
    lanes: int
    cpu_lanes: int


class Problem(NamedTuple):
    """What is traced and has no gradient: lists, and segment ids if there are any."""

    lists: Lists
    query_segments: Int[Array, "R Q"] | None
    key_segments: Int[Array, "U P"] | None


def forward(
    plan: Plan,
    query: Float[Array, "R Q H"],
    key: Float[Array, "U P H"],
    value: Float[Array, "U P H"],
    problem: Problem,
) -> tuple[Float[Array, "R Q H"], Float[Array, "R Q"]]:
    """Returns (out, lse), by an online softmax over the list of each row."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def attend(
        _: None, rows: tuple[Array, Lists, Array | None]
    ) -> tuple[None, tuple[Array, Array]]:
        q, lists, segments = rows

        def read_tile(step: Array, carry: _Carry) -> _Carry:
            acc, peak, total = carry
            visit = _Visit.at(lists, step)
            raw = _product(q, visit.read(key), (2, 2), dtype)
            mask = visit.mask(plan, q.shape[1], segments, problem.key_segments)
            logits = jnp.where(mask, plan.scores.logits(raw), -jnp.inf)
            new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
            weights = jnp.exp(logits - new_peak)
            decay = jnp.exp(peak - new_peak)
            read = _product(weights.astype(q.dtype), visit.read(value), (2, 1), dtype)
            total = total * decay + weights.sum(-1, keepdims=True)
            return acc * decay + read, new_peak, total

        zero = jnp.zeros((*q.shape[:2], 1), dtype)
        # Finite, so that a row that sees nothing never meets inf - inf.
        lowest = jnp.full_like(zero, jnp.finfo(dtype).min)
        acc, peak, total = lax.fori_loop(
            0, lists.counts.max(), read_tile, (jnp.zeros(q.shape, dtype), lowest, zero)
        )
        is_empty = total == 0
        total = jnp.where(is_empty, 1, total)
        lse = jnp.where(is_empty, -jnp.inf, peak + jnp.log(total))
        return None, ((acc / total).astype(q.dtype), lse[..., 0])

    rows = (query, problem.lists, problem.query_segments)
    _, (out, lse) = lax.scan(attend, None, _in_groups(plan, rows))
    return out.reshape(query.shape), lse.reshape(query.shape[:2])


def backward(
    plan: Plan,
    query: Float[Array, "R Q H"],
    key: Float[Array, "U P H"],
    value: Float[Array, "U P H"],
    problem: Problem,
    out: Float[Array, "R Q H"],
    lse: Float[Array, "R Q"],
    d_out: Float[Array, "R Q H"],
    d_lse: Float[Array, "R Q"],
) -> tuple[Float[Array, "R Q H"], Float[Array, "U P H"], Float[Array, "U P H"]]:
    """Returns (dQ, dK, dV) from W = exp(S - lse), with X = Q K' the raw products.

    dV = W' dO,  dX = W (dO V' - rowsum(dO O) + dlse) dS/dX,  dQ = dX K,  dK = dX' Q

    dK and dV are summed transposed, [U, H, P], as products dO' W and Q' dX: XLA's CPU backend
    is four times slower where the first of two factors is transposed.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    shift = jnp.sum(d_out.astype(dtype) * out.astype(dtype), -1) - d_lse
    # exp(s - inf) = 0: a row that sees nothing has no weights.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)

    def attend(
        sums: tuple[Array, Array],
        rows: tuple[Array, Array, Array, Array, Lists, Array | None],
    ) -> tuple[tuple[Array, Array], Array]:
        q, d_o, row_lse, row_shift, lists, segments = rows
        q_columns, d_o_columns = (x.swapaxes(1, 2) for x in (q, d_o))

        def read_tile(step: Array, carry: _Carry) -> _Carry:
            d_q, d_key, d_value = carry
            visit = _Visit.at(lists, step)
            k = visit.read(key)
            logits = plan.scores.logits(_product(q, k, (2, 2), dtype))
            mask = visit.mask(plan, q.shape[1], segments, problem.key_segments)
            weights = jnp.where(mask, jnp.exp(logits - row_lse), 0)
            d_weights = _product(d_o, visit.read(value), (2, 2), dtype)
            d_logits = weights * (d_weights - row_shift)
            # Masked again: 0 times a product that overflowed would be NaN.
            d_raw = jnp.where(mask, d_logits * plan.scores.slope(logits), 0)
            weights, d_raw = weights.astype(q.dtype), d_raw.astype(q.dtype)
            d_value = visit.add(d_value, _product(d_o_columns, weights, (2, 1), dtype))
            d_key = visit.add(d_key, _product(q_columns, d_raw, (2, 1), dtype))
            return d_q + _product(d_raw, k, (2, 1), dtype), d_key, d_value

        start = (jnp.zeros(q.shape, dtype), *sums)
        d_q, d_key, d_value = lax.fori_loop(0, lists.counts.max(), read_tile, start)
        return (d_key, d_value), d_q.astype(q.dtype)

    stats = (lse[..., None], shift[..., None])
    rows = (query, d_out, *stats, problem.lists, problem.query_segments)
    zeros = jnp.zeros_like(key.swapaxes(1, 2), dtype)
    sums, d_query = lax.scan(attend, (zeros, zeros), _in_groups(plan, rows))
    d_key, d_value = (total.swapaxes(1, 2).astype(key.dtype) for total in sums)
    return d_query.reshape(query.shape), d_key, d_value


class _Visit(NamedTuple):
    """One step of a group of rows: the key tile that each of them reads."""

    lists: Lists
    tile: Int[Array, "L"]
    is_listed: Bool[Array, "L"]

    @classmethod
    def at(cls, lists: Lists, step: Int[Array, ""]) -> "_Visit":
        """Returns entry number step; past its end a list repeats a tile, masked."""
        return cls(lists, lists.tiles[:, step], step < lists.counts)

    def read(self, source: Float[Array, "U P H"]) -> Float[Array, "L P H"]:
        """Gathers the tiles."""
        return source.at[self.tile].get(mode="promise_in_bounds")

    def add(
        self, target: Float[Array, "U H P"], update: Float[Array, "L H P"]
    ) -> Float[Array, "U H P"]:
        """Adds to the tiles in place; rows of a group never share one."""
        tiles_of_rows = target.at[self.tile]
        return tiles_of_rows.add(update, mode="promise_in_bounds", unique_indices=True)

    def mask(
        self,
        plan: Plan,
        row_length: int,
        query_segments: Int[Array, "L Q"] | None,
        key_segments: Int[Array, "U P"] | None,
    ) -> Bool[Array, "L Q P"]:
        """Returns which pairs of tokens are visible."""
        geometry = plan.geometry
        place = jnp.arange(row_length) % geometry.query_block_size
        query = self.lists.start[:, None, None] + place[:, None]
        key_block = self.tile % geometry.key_blocks
        first_key = key_block * geometry.key_block_size
        key = first_key[:, None, None] + jnp.arange(geometry.key_block_size)
        mask = self.is_listed[:, None, None] & (key < geometry.key_length)
        mask &= geometry.pairs(query, key)
        mask &= tiles.rule_pairs(plan.rule, self.lists.head[:, None, None], query, key)
        if self.lists.blocks is not None:
            size = geometry.query_block_size // self.lists.blocks.shape[-1]
            of_tile = jnp.take_along_axis(self.lists.blocks, key_block[:, None, None], axis=1)
            mask &= jnp.take(of_tile[:, 0], place // size, axis=1)[:, :, None]
        if query_segments is not None and key_segments is not None:
            mask &= query_segments[:, :, None] == key_segments[self.tile][:, None]
        return mask


def _product(
    left: Float[Array, "L X Y"],
    right: Float[Array, "L Z W"],
    axes: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "L A B"]:
    """Matrix product over one axis of each, batched over the first; exact for float32."""
    contract = ((axes[0],), (axes[1],))
    return lax.dot_general(
        left,
        right,
        (contract, ((0,), (0,))),
        precision=precision.exact(left.dtype),
        preferred_element_type=dtype,
    )


def _in_groups(plan: Plan, rows: _Tree) -> _Tree:
    """Splits the first axis of every array into groups of rows computed together."""
    lanes = plan.lanes
    return jax.tree.map(lambda x: x.reshape(-1, lanes, *x.shape[1:]), rows)
