"""Strictly causal attention inside clusters: to the last w members of a token's own cluster.

Tokens are sorted by cluster into *slots*, each cluster from a new block of P slots on, so a
token's place in its block is its rank in the cluster modulo P. Its mates lie in its own block
and those right before. Ranks come from the past alone, and so does every bit of the output.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.attention import _bands, _clusters, _tiles
from sparseformer_jax.attention.inputs import SegmentIds


class Slots(NamedTuple):
    """Where tokens lie, sorted by cluster: S tokens, L slots in blocks of P.

    Attributes:
      token: in each slot; S in an empty one.
      slot: of each token.
      cluster: of each block; C past the last.
    """

    token: Int[Array, "B R L"]
    slot: Int[Array, "B R S"]
    cluster: Int[Array, "B R M"]


def block_size(window_size: int) -> int:
    """Returns P: half a window, as larger blocks hide more of what they compute."""
    return 8 * max(1, math.ceil(window_size / 16))


def sort(cluster: Int[Array, "B R S"], num_clusters: int, size: int) -> Slots:
    """Returns the slots of tokens with these clusters, in blocks of a size.

    There are L = floor((S + C (P - 1)) / P) P slots, enough for any clusters.
    """
    num_tokens = cluster.shape[-1]
    num_blocks = (num_tokens + num_clusters * (size - 1)) // size

    def sort_row(cluster: jax.Array) -> Slots:
        order = jnp.argsort(cluster, stable=True)
        counts = _clusters.sizes(cluster, num_clusters)
        blocks = -(-counts // size)
        # What the ends of clusters before leave empty, in slots.
        shift = size * (jnp.cumsum(blocks) - blocks) - (jnp.cumsum(counts) - counts)
        slots = jnp.arange(num_tokens) + shift[cluster[order]]
        token = jnp.full(num_blocks * size, num_tokens)
        last = jnp.cumsum(blocks)
        return Slots(
            token.at[slots].set(order, unique_indices=True),
            jnp.zeros_like(slots).at[order].set(slots, unique_indices=True),
            jnp.sum(jnp.arange(num_blocks)[:, None] >= last, axis=1),
        )

    return jax.vmap(jax.vmap(sort_row))(cluster)


def attend(
    x: Float[Array, "B S R H"],
    value: Float[Array, "B S R H"],
    slots: Slots,
    window_size: int,
    *,
    num_clusters: int,
    num_queries: int,
    query_offset: Any = 0,
    segment_ids: SegmentIds | None = None,
    masks_self: bool,
    scale: float,
    cap: float | None = None,
    relative: _tiles.Relative | None = None,
) -> Float[Array, "B T R H"]:
    """Returns attention of T tokens, from an offset on, to the last members of their clusters.

    Args:
      x: vectors that are queries and keys at once.
      value: of every token.
      slots: of every token.
      window_size: w, the token itself counted.
      num_clusters: C.
      num_queries: T.
      query_offset: of the first query.
      segment_ids: members of another segment are not seen.
      masks_self: a token sees itself only where it sees no other.
      scale: of the logits.
      cap: of the logits, see `_tiles.attend`.
      relative: embeddings of the difference of ranks.
    """
    (batch, heads, num_blocks), num_keys = slots.cluster.shape, x.shape[1]
    size = slots.token.shape[-1] // num_blocks
    back = math.ceil((min(window_size, num_keys) - 1) / size)
    logits = _tiles.Plan(scale, cap, first_place=-back * size)
    plan = _bands.Plan(size, back, window_size, masks_self, logits)
    padded = _behind(slots, back, num_keys)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(batch * heads, *x.shape[2:])

    ids = None
    if segment_ids is not None:
        ids = rows(jax.vmap(lambda ids, token: ids[token])(segment_ids[1], padded.token))
    vectors, values = (rows(_to_slots(each, padded)) for each in (x, value))
    of_slots = _bands.Rows(vectors, values, rows(padded.cluster), ids)
    if num_queries == num_keys:
        out = _bands.attend(plan, of_slots, relative)
    else:
        blocks, slots = _of_queries(slots, num_clusters, num_queries, query_offset)
        tiles = (jax.vmap(lambda x, i: x[i])(x, rows(blocks)) for x in _bands.tiles(plan, of_slots))
        out = _tiles.attend(
            *tiles,
            last_resort=plan.last_resort,
            relative=relative,
            **dataclasses.asdict(plan.scores),
        )
    return _from_slots(out.reshape(batch, heads, -1, out.shape[-1]), slots)


def _behind(slots: Slots, blocks: int, num_tokens: int) -> Slots:
    """The slots behind so many blocks that are empty and of no cluster."""
    size = slots.token.shape[-1] // slots.cluster.shape[-1]

    def pad(x: jax.Array, width: int, value: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (width, 0)), constant_values=value)

    return Slots(
        pad(slots.token, blocks * size, num_tokens),
        slots.slot + blocks * size,
        pad(slots.cluster, blocks, -1),
    )


def _of_queries(
    slots: Slots, num_clusters: int, num_queries: int, offset: Any
) -> tuple[jax.Array, Slots]:
    """The blocks in which the queries lie, each once, and where they lie in those alone."""
    num_blocks = slots.cluster.shape[-1]
    size = slots.token.shape[-1] // num_blocks
    # Blocks are full of queries but for the first and the last of each cluster.
    most = min(num_blocks, num_queries, (num_queries + 2 * num_clusters * (size - 1)) // size)

    def of_row(slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        block = slot // size
        has_query = jnp.zeros(num_blocks, bool).at[block].set(True)
        blocks = jnp.argsort(~has_query, stable=True)[:most]
        slot = (jnp.cumsum(has_query) - 1)[block] * size + slot % size
        token = jnp.full(most * size, num_queries).at[slot].set(jnp.arange(num_queries))
        return blocks, token, slot

    slot = jax.lax.dynamic_slice_in_dim(slots.slot, offset, num_queries, axis=2)
    blocks, token, slot = jax.vmap(jax.vmap(of_row))(slot)
    return blocks, Slots(token, slot, jnp.take_along_axis(slots.cluster, blocks, axis=2))


def _to_slots(x: Float[Array, "B S R H"], slots: Slots) -> Float[Array, "B R L H"]:
    """Returns what lies in each slot, 0 in empty ones."""
    of_slots, of_tokens = _rows(slots)
    return _rearrange(x.reshape(-1, x.shape[-1]), of_slots, of_tokens)


def _from_slots(x: Float[Array, "B R L H"], slots: Slots) -> Float[Array, "B S R H"]:
    """Returns what every token's slot holds."""
    of_slots, of_tokens = _rows(slots)
    return _rearrange(x.reshape(-1, x.shape[-1]), of_tokens, of_slots)


def _rows(slots: Slots) -> tuple[Int[Array, "B R L"], Int[Array, "B S R"]]:
    """The row of [B S R, ..] in each slot, one too many if none; that of [B R L, ..] by token."""
    batch, heads, num_tokens = slots.slot.shape
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    of_slots = (row * num_tokens + slots.token) * heads + head
    of_slots = jnp.where(slots.token < num_tokens, of_slots, slots.slot.size)
    of_tokens = (row * heads + head) * slots.token.shape[-1] + slots.slot
    return of_slots, jnp.swapaxes(of_tokens, 1, 2)


@jax.custom_vjp
def _rearrange(
    x: Float[Array, "X H"], take: Int[Array, "*Y"], back: Int[Array, "*Z"]
) -> Float[Array, "*Y H"]:
    """Returns the rows `take` of x, 0 past its end, where `back` are those of the result.

    So the gradient gathers too: a scatter would add row by row.
    """
    return x.at[take].get(mode="fill", fill_value=0)


def _rearrange_fwd(
    x: jax.Array, take: jax.Array, back: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rearrange(x, take, back), (take, back)


def _rearrange_bwd(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None, None]:
    _, back = residuals
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return rows.at[back.reshape(-1)].get(mode="fill", fill_value=0), None, None


_rearrange.defvjp(_rearrange_fwd, _rearrange_bwd)
