"""Attention whose pattern is a closed-form rule over blocks of tokens."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockMask, block_sparse_attention
from pallas_kernels.block_sparse_attention.selection import IMPLEMENTATIONS
from pallas_kernels.rules import Rule
from pallas_kernels.selection import CannotRun
from sparseformer_jax.attention import _one_query
from sparseformer_jax.attention.base import Attention, AttentionOutput
from sparseformer_jax.attention.inputs import Inputs, SegmentIds, Shard
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.model.config import ModelConfig


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless it names an implementation of the kernel, or is None."""
    IMPLEMENTATIONS.asked_for(implementation)


class BlockSparseAttention(Attention):
    """Attention by `rule`, through `pallas_kernels.block_sparse_attention`.

    A method overrides `rule`, and `window_size` where the rule reads tokens.
    """

    def rule(self) -> Rule:
        """Returns the rule of all heads over the whole sequence."""
        raise NotImplementedError

    @property
    def window_size(self) -> int | None:
        """Tokens a query sees, itself counted; None: no such limit."""
        return None

    def density(self, seq_len: int) -> float:
        """Returns attended pairs divided by those of full attention, exactly."""
        mask = self._mask(seq_len, seq_len, 0)
        farthest = min(self.window_size or seq_len, seq_len) - 1
        nearest = 0 if self.config.is_causal else -farthest
        query_ends, key_ends = (
            np.append(np.arange(0, seq_len, size), seq_len)
            for size in (mask.query_block_size, mask.key_block_size)
        )
        pairs = _pairs(query_ends, key_ends, nearest)
        pairs -= _pairs(query_ends, key_ends, farthest + 1)
        pairs = np.diff(np.diff(pairs, axis=0), axis=1)  # of every block
        slots = np.arange(mask.kv_indices.shape[-1])
        listed = slots < mask.kv_counts[..., None]
        attended = pairs[np.arange(len(pairs))[:, None], mask.kv_indices]
        full = seq_len * (seq_len + 1) // 2 if self.config.is_causal else seq_len**2
        return float((attended * listed).sum() / (len(mask.kv_counts) * full))

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns attention over the active blocks, with the density of the pattern."""
        query, key, value = inputs.query, inputs.key, inputs.value
        output = self._attend_by_rule(query, key, value, inputs.segment_ids, shard)
        return AttentionOutput(output, diagnostics=self._diagnostics(key.shape[1]))

    def _attend_by_rule(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: SegmentIds | None,
        shard: Shard,
    ) -> Any:
        """Attends to what the rule says of this device's queries and heads."""
        num_queries, num_keys, num_heads = query.shape[1], key.shape[1], query.shape[2]
        if num_queries > 1 or shard.seq_axes or not self.config.is_causal:
            mask = self._local_mask(num_queries, num_keys, num_heads, shard)
            return self._attend_blocks(query, key, value, mask, segment_ids)
        position = jnp.full(query.shape[0], shard.query_offset)
        keys = jnp.broadcast_to(jnp.arange(num_keys), (len(query), 1, num_keys))
        kept = self._visible(position, keys, num_heads, shard)
        if segment_ids is not None:
            of_query, of_keys = segment_ids
            kept = kept & (of_query == of_keys)[:, None]
        return self._attend_one(query, [(lambda _: (key, value, kept), 1)])

    def _visible(
        self, positions: jax.Array, keys: jax.Array, num_heads: int, shard: Shard
    ) -> jax.Array:
        """Which keys [B, 1 or K, C] one query a sequence sees, by each pattern head P here."""
        rule = self.rule()
        heads = jnp.arange(max(1, rule.pattern_heads * num_heads // shard.num_heads))
        heads += shard.head_offset * rule.pattern_heads // shard.num_heads
        keys = keys[:, np.arange(len(heads)) * keys.shape[1] // len(heads)]
        return _one_query.visible(rule, heads, positions, keys, self.window_size)

    def _attend_one(self, query: jax.Array, parts: Sequence[_one_query.Part]) -> jax.Array:
        """Attends to parts of the keys from one query a sequence."""
        scale, cap = self.config.scale, self.config.attention_soft_cap
        return _one_query.attend(query, parts, scale, cap)

    def _attend_blocks(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        block_mask: BlockMask,
        segment_ids: SegmentIds | None,
    ) -> Any:
        """Calls the kernel with what the model and the options say of it."""
        implementation = self.options.implementation
        return attend_blocks(
            self.config, implementation, query, key, value, block_mask, segment_ids
        )

    def _diagnostics(self, seq_len: int) -> dict[str, jax.Array]:
        return {"density": jnp.asarray(self.density(seq_len), jnp.float32)}

    def _mask(self, num_queries: int, num_keys: int, offset: int | jax.Array) -> BlockMask:
        """The mask of all heads for queries that start at an offset."""
        limits = (self.config.is_causal, self.window_size)
        if isinstance(offset, int):
            return _static_mask(self.rule(), num_queries, num_keys, offset, *limits)
        return _make_mask(self.rule(), num_queries, num_keys, offset, *limits)

    def _local_mask(
        self, num_queries: int, num_keys: int, num_heads: int, shard: Shard
    ) -> BlockMask:
        """The mask of this device's queries and heads."""
        mask = self._mask(num_queries, num_keys, shard.query_offset)
        pattern_heads = mask.kv_counts.shape[0]
        if pattern_heads > 1 and num_heads < shard.num_heads:
            first = shard.head_offset * pattern_heads // shard.num_heads
            mask = mask.take_heads(first, pattern_heads * num_heads // shard.num_heads)
        size, block_size = mask.query_block_size, self.rule().block_size
        if mask.inner_rule is None or block_size is None:
            return mask
        # A traced offset may be anything to a rule. Where devices cut the sequence it is a
        # multiple of the queries: if no tile crosses a block's border, the tiles say it all,
        # and fast kernels take them.
        if not shard.seq_axes or num_queries % size or block_size % size:
            return mask
        return BlockMask.from_block_map(
            mask.block_map(),
            num_queries,
            num_keys,
            size,
            mask.key_block_size,
            is_causal=self.config.is_causal,
            window_size=self.window_size,
            query_offset=shard.query_offset,
        )


def attend_blocks(
    config: ModelConfig,
    implementation: str | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_mask: BlockMask,
    segment_ids: SegmentIds | None,
    return_lse: bool = False,
) -> Any:
    """Returns `block_sparse_attention` with the model's logits and the limits of the mask.

    Raises:
      ConfigError: the implementation cannot run here.
    """
    try:
        return block_sparse_attention(
            query,
            key,
            value,
            block_mask,
            is_causal=block_mask.is_causal,
            window_size=block_mask.window_size,
            segment_ids=segment_ids,
            scale=config.scale,
            logits_soft_cap=config.attention_soft_cap,
            implementation=implementation,
            return_lse=return_lse,
        )
    except CannotRun as error:
        raise ConfigError(f"attention.implementation={implementation!r}: {error}") from None


def _make_mask(
    rule: Rule,
    num_queries: int,
    num_keys: int,
    offset: int | jax.Array,
    is_causal: bool,
    window_size: int | None,
) -> BlockMask:
    return BlockMask.from_rule(
        rule,
        num_queries,
        num_keys,
        is_causal=is_causal,
        window_size=window_size,
        query_offset=offset,
    )


# Tables of a static mask are made on the host, once for all layers and traces.
_static_mask = functools.lru_cache(maxsize=64)(_make_mask)


def _pairs(query_ends: np.ndarray, key_ends: np.ndarray, distance: int) -> np.ndarray:
    """Pairs with i < query_ends[m], j < key_ends[n] and i - j >= distance."""

    def triangle(n: np.ndarray) -> np.ndarray:
        n = np.maximum(n, 0)
        return n * (n + 1) // 2

    # Query i has max(0, i - distance + 1) such keys, but for those past the end.
    nearest = np.stack(np.broadcast_arrays(distance, distance + key_ends))[:, None, :]
    keys, beyond = triangle(query_ends[:, None] - nearest) - triangle(-nearest)
    return keys - beyond
