"""Blocks of tokens where documents are packed: each is pooled over one document alone.

A block of queries belongs to the document of its first token, one of keys to that of its last:
of two blocks the earlier one as keys and the later one as queries, no other document is in both.
So whole documents stay apart, and a block inside of one is pooled whole.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax.attention._gates import pool


class Pooled(NamedTuple):
    """Blocks of tokens, each of one document.

    Attributes:
      vectors: pooled [B, J, K, pH].
      positions: of the first token that is pooled [B, J], in its document.
      documents: that the blocks belong to [B, J]; None: there is one.
      is_kept: which tokens are pooled [B, S].
    """

    vectors: Float[Array, "B J K pH"]
    positions: Int[Array, "B J"]
    documents: Int[Array, "B J"] | None
    is_kept: Bool[Array, "B S"]


def pooled(
    x: Float[Array, "B S K H"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None,
    size: int,
    pools: Sequence[str],
    belongs_to: Literal["first", "last"],
) -> Pooled:
    """Returns the blocks of so many tokens.

    Args:
      x: vectors of tokens.
      positions: of each in its document.
      segment_ids: document of each; None: one.
      size: P, tokens in a block; the last block may be short.
      pools: what blocks are pooled by, see `_gates.pool`.
      belongs_to: the token whose document a block is pooled over.
    """
    length = x.shape[1]
    starts = jnp.arange(0, length, size)
    if segment_ids is None:
        is_kept = jnp.ones(x.shape[:2], bool)
        return Pooled(pool(x, size, pools, is_kept), positions[:, starts], None, is_kept)
    chosen = starts if belongs_to == "first" else jnp.minimum(starts + size, length) - 1
    documents = segment_ids[:, chosen]
    is_kept = segment_ids == jnp.repeat(documents, size, axis=1)[:, :length]
    padded = jnp.pad(is_kept, [(0, 0), (0, -length % size)]).reshape(len(x), -1, size)
    first = starts + jnp.argmax(padded, axis=-1)
    positions = jnp.take_along_axis(positions, first, axis=1)
    return Pooled(pool(x, size, pools, is_kept), positions, documents, is_kept)


def of_tokens(
    rows: Float[Array, "B M"], size: int, segment_ids: Int[Array, "B T"] | None, length: int
) -> Float[Array, "B T"]:
    """Returns what each row says to the tokens of its first document; 0 to the others."""
    tokens = jnp.repeat(rows, size, axis=1)[:, :length]
    if segment_ids is None:
        return tokens
    documents = jnp.repeat(segment_ids[:, ::size], size, axis=1)[:, :length]
    return jnp.where(segment_ids == documents, tokens, 0)


def pairs(
    chosen: Bool[Array, "B n M J"], places: Int[Array, " T"], num_keys: int, size: int
) -> Float[Array, "B M"]:
    """Returns the causal pairs of queries and keys in chosen blocks, of a head on average.

    Args:
      chosen: for each row, a block of queries or a single one.
      places: of the queries in the sequence, which is taken for one document.
      num_keys: S, of the sequence.
      size: P, tokens in a block.
    """
    starts = jnp.arange(0, num_keys, size)
    lengths = jnp.minimum(starts + size, num_keys) - starts
    of_rows = jnp.clip(places[:, None] + 1 - starts, 0, lengths).astype(jnp.float32)
    num_queries, rows = len(places), chosen.shape[2]
    if rows < num_queries:
        of_rows = jnp.pad(of_rows, [(0, -num_queries % size), (0, 0)])
        of_rows = jnp.sum(of_rows.reshape(rows, size, -1), axis=1)
    return jnp.sum(jnp.mean(chosen, axis=1, dtype=jnp.float32) * of_rows, axis=-1)
