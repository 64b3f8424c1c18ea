"""What Combiner's variants share: blocks of tokens, summaries of spans, the joint softmax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels import BlockMask
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.rules import Dense
from sparseformer_jax.attention._block_sparse import attend_blocks
from sparseformer_jax.attention.inputs import SegmentIds, Shard
from sparseformer_jax.model.config import ModelConfig

# The document of padding, of spans without a token, and of nobody else.
NO_DOCUMENT = np.iinfo(np.int32).min


class Tokens(NamedTuple):
    """The sequence, or this device's part of it.

    Attributes:
      query: [B, T, N, H].
      key: [B, T, K, H].
      value: [B, T, K, H].
      ids: documents [B, T], each of which is contiguous; None: there is one, and no padding
        that a token could see.
    """

    query: Any
    key: Any
    value: Any
    ids: Any = None


class Part(NamedTuple):
    """A softmax over some of the pairs of every query, to be merged with others.

    Attributes:
      output: [B, T, N, H].
      lse: log of the sum of exponentials [B, T, N]; -inf: the query has no such pair.
    """

    output: Any
    lse: Any


class Spans(NamedTuple):
    """Pairs that stand for spans.

    Attributes:
      key: [B, R, N, H], or of K heads.
      value: [B, R, N, H].
      ids: document of each span [B, R], None as in `Tokens`.
    """

    key: Any
    value: Any
    ids: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the functions of a variant are told beside the tokens.

    Attributes:
      config: of the model.
      options: `combiner.Options`.
      size: tokens in a span, a row, or a block.
      pool_query: what is pooled of queries [.., H].
      pool_key: of keys.
      row_key: makes keys of the pairs of rows [B, T, N, H], of what tokens read there, their x
        and their positions.
      shard: this device's part of the sequence.
      num_shards: parts of the sequence.
      is_reversed: the tokens come last one first.
    """

    config: ModelConfig
    options: Any
    size: int
    pool_query: Callable[[jax.Array], jax.Array]
    pool_key: Callable[[jax.Array], jax.Array]
    row_key: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    shard: Shard
    num_shards: int = 1
    is_reversed: bool = False

    @property
    def scores(self) -> Scores:
        """From products to logits."""
        return Scores(self.config.scale, self.config.attention_soft_cap)

    def first(self, num_tokens: int) -> Any:
        """Returns the position of the first of the local tokens, as they come."""
        first = self.shard.query_offset
        return (self.num_shards - 1) * num_tokens - first if self.is_reversed else first

    def gather(self, arrays: Any) -> Any:
        """Returns the arrays [B, R, ..] of all devices, as the tokens come."""

        def whole(x: jax.Array) -> jax.Array:
            if self.is_reversed:
                return flip(self.shard.gather(flip(x), axis=1))
            return self.shard.gather(x, axis=1)

        return jax.tree.map(whole, arrays)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        ids: SegmentIds | None,
        *,
        is_causal: bool = True,
        offset: Any = 0,
        query_tile: int | None = None,
    ) -> Part:
        """Returns attention to keys j <= i + offset of the query's document, or to all its keys."""
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        make = _make_mask if isinstance(offset, jax.Array) else _static_mask
        mask = make(query.shape[1], key.shape[1], query_tile, is_causal, offset)
        implementation = self.options.implementation
        arguments = (query, key, value, mask, ids)
        return Part(*attend_blocks(self.config, implementation, *arguments, return_lse=True))

    def both_ways(
        self, spans: Callable[[Tokens, "Setup", bool], list[Part]], tokens: Tokens
    ) -> list[Part]:
        """Returns the parts of what lies before each token, and unless causal of what follows.

        What follows lies before in the reversed sequence.

        Args:
          spans: called with tokens, the setup and whether the token's own block counts too.
          tokens: of which it makes parts.
        """
        parts = spans(tokens, self, False)
        if self.config.is_causal:
            return parts
        reverse = dataclasses.replace(self, is_reversed=not self.is_reversed)
        after = spans(jax.tree.map(flip, tokens), reverse, self.options.count_own_span)
        return parts + jax.tree.map(flip, after)


def _make_mask(
    num_queries: int, num_keys: int, query_tile: int | None, is_causal: bool, offset: Any
) -> BlockMask:
    return BlockMask.from_rule(
        Dense(), num_queries, num_keys, query_tile, is_causal=is_causal, query_offset=offset
    )


# Tables of a static mask are made on the host, once for all layers and traces.
_static_mask = functools.lru_cache(maxsize=64)(_make_mask)


def merge(parts: list[Part], dtype: Any) -> Float[Array, "B T N H"]:
    """Returns the softmax over the pairs of all parts together.

    out = sum_p exp(lse_p - lse) out_p,  lse = log sum_p exp(lse_p)
    """
    weights = jax.nn.softmax(jnp.stack([part.lse for part in parts]), axis=0)
    weighed = (
        weight[..., None] * part.output.astype(weight.dtype)
        for weight, part in zip(weights, parts, strict=True)
    )
    return functools.reduce(jnp.add, weighed).astype(dtype)


def masked(part: Part, seen: Bool[Array, "B T"]) -> Part:
    """Returns the part without the pairs of tokens that see none."""
    return Part(
        jnp.where(seen[..., None, None], part.output, 0),
        jnp.where(seen[..., None], part.lse, -jnp.inf),
    )


def flip(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Returns the array with its tokens last one first."""
    return jnp.flip(x, axis=1)


def pad(tokens: Any, size: int) -> Any:
    """Pads the sequence at its end to whole blocks; documents get `NO_DOCUMENT`."""

    def padded(x: jax.Array) -> jax.Array:
        widths = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
        is_id = jnp.issubdtype(x.dtype, jnp.integer)
        return jnp.pad(x, widths, constant_values=NO_DOCUMENT if is_id else 0)

    return jax.tree.map(padded, tokens)


def cut(arrays: Any, size: int) -> Any:
    """Cuts arrays [B, T, ..] into blocks [B, R, size, ..]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size, *x.shape[2:]), arrays)


def attend_within(tokens: Tokens, setup: Setup, *, is_causal: bool) -> Part:
    """Returns attention inside each block: blocks are rows of the batch."""
    batch, num_tokens, *_ = tokens.query.shape

    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(-1, setup.size, *x.shape[2:])

    query, key, value, ids = jax.tree.map(fold, tokens)
    pair = None if ids is None else (ids, ids)
    part = setup.attend(query, key, value, pair, is_causal=is_causal)
    return jax.tree.map(lambda x: x.reshape(batch, num_tokens, *x.shape[2:]), part)


def in_last_document(ids: Int[Array, "B R s"]) -> Bool[Array, "B R s"]:
    """Returns which tokens are of their block's last document.

    It alone can go on past the block, so of a block a later query sees these or none.
    """
    return ids == ids[..., -1:]


def per_head(x: Float[Array, "*B K H"], num_heads: int) -> Float[Array, "*B N H"]:
    """Returns keys or values for every query head."""
    return jnp.repeat(x, num_heads // x.shape[-2], axis=-2)


def pooled(
    x: Float[Array, "B R s N H"], visible: Bool[Array, "B R s"] | None
) -> Float[Array, "B R N H"]:
    """Returns the elementwise maximum over each block's visible tokens, in float32."""
    where = True if visible is None else visible[..., None, None]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.max(x, axis=2, where=where, initial=-jnp.inf)


def softmax(
    logits: Float[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns the softmax along an axis, 0 where all logits are -inf, and its lse."""
    lse = jax.nn.logsumexp(logits, axis=axis, keepdims=True)
    # Where nothing is visible exp(-inf - inf) = 0.
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(lse), jnp.inf, lse))
    return weights, jnp.squeeze(lse, axis)


def read(
    query: Float[Array, "B R N H"],
    blocks: Tokens,
    visible: Bool[Array, "B R s"] | None,
    setup: Setup,
) -> Part:
    """Returns the attention of one query a block to the visible tokens there, in float32."""
    num_heads, dtype = query.shape[2], query.dtype
    key, value = (per_head(x.astype(dtype), num_heads) for x in (blocks.key, blocks.value))
    logits = setup.scores.logits(jnp.sum(query[:, :, None] * key, axis=-1))  # [B, R, s, N]
    if visible is not None:
        logits = jnp.where(visible[..., None], logits, -jnp.inf)
    weights, lse = softmax(logits, axis=2)
    return Part(jnp.sum(weights[..., None] * value, axis=2), lse)


def summarise(blocks: Tokens, setup: Setup) -> Spans:
    """Returns the pair that stands for each block [B, R, s, ..], of its last document.

    Keys have as many heads as those of tokens.

        K = pool_j k_j,  Q = pool_j q_j,  u = sum_j softmax_j(scale Q k_j) v_j

    with pool the elementwise maximum. Source: Ren et al. 2021, section 3.
    """
    num_heads, ids = blocks.query.shape[3], blocks.ids
    visible = None if ids is None else in_last_document(ids)
    key = pooled(setup.pool_key(blocks.key), visible)
    if blocks.key.shape[2] == 1:
        value = per_head(blocks.value[:, :, 0], num_heads)
    else:
        query = pooled(setup.pool_query(blocks.query), visible)
        value = read(query, blocks, visible, setup).output
    return Spans(key, value, None if ids is None else ids[..., -1])


def single(
    query: Float[Array, "*T N H"],
    key: Float[Array, "*#T N H"],
    value: Float[Array, "*#T N H"],
    seen: Bool[Array, "*T"] | None,
    setup: Setup,
) -> Part:
    """Returns attention to one key a query; none where it is not seen."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = setup.scores.logits(jnp.sum(query.astype(dtype) * key.astype(dtype), axis=-1))
    if seen is not None:
        logits = jnp.where(seen[..., None], logits, -jnp.inf)
    return Part(jnp.broadcast_to(value, query.shape), logits)
