"""Attention to blocks that a gate chooses, as tokens come one after another too.

In decoding a gate of single queries chooses for each of them. One of blocks of queries chooses for
pieces of a sequence that begin with a block, so for prompts: as in a whole sequence that ends where
the piece does, the last block as far as it goes included. Single tokens make no blocks, nor do
pieces that begin inside of one: these attend densely, as in the release.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import BlockMask
from sparseformer_jax.attention import (
    _cache,
    _gates,
    _pooled_blocks,
    _pooled_cache,
    _query_chunks,
)
from sparseformer_jax.attention._block_selection import choose
from sparseformer_jax.attention._by_rule import RuleAttention
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention._gate_scores import Scored
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.model.config import ModelConfig


class GatedAttention(RuleAttention):
    """A gate of `SelectionOptions`, and what it chooses of the tokens of a cache."""

    needs: ClassVar[frozenset[str]] = frozenset({"unrotated_query", "unrotated_key"})
    cache_axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = _pooled_cache.AXES

    def __init__(self, config: ModelConfig, options: Any, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, rngs=rngs)
        self.gate = _gates.BlockGate(config, options, rngs=rngs)

    def init_cache(self, batch_size: int, size: int, num_layers: int = 1) -> Cache:
        """Returns the empty cache: of all tokens, and of pooled keys where the gate chooses."""
        tokens = (num_layers, batch_size, size)
        if not self.options.chooses:
            return _cache.empty(_cache.KEYS, self.config, tokens)
        return _pooled_cache.empty(self.config, self.gate, tokens)

    def _attend_map(
        self, inputs: Inputs, chosen: Bool[Array, "B n M J"], offset: Any, capacity: int | None
    ) -> Float[Array, "B T N H"]:
        """Attention to a map of blocks, of which a row has at most `capacity`."""
        size = self.options.block_size
        query, key, value = inputs.query, inputs.key, inputs.value
        mask = BlockMask.from_block_map(
            chosen,
            query.shape[1],
            key.shape[1],
            size if self.options.gates == "prefill" else 1,
            size,
            is_causal=True,
            query_offset=offset,
            capacity=capacity,
        )
        return self._attend_blocks(query, key, value, mask, inputs.segment_ids)

    def _decode(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any, shard: Shard
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Chooses by the pooled keys of the cache, and reads the keys of what is chosen."""
        options, num_queries = self.options, inputs.query.shape[1]
        if options.selector != "gate":
            raise ConfigError(
                f"attention.selector={options.selector!r}: generated text is read by gates "
                "alone; take 'gate'"
            )
        if not options.chooses:
            inputs = dataclasses.replace(inputs, unrotated_query=None, unrotated_key=None)
            return super()._decode(inputs, start, cache, layer, shard)
        cache = _pooled_cache.write(cache, self.gate, inputs, start, layer)
        if num_queries > 1:
            return self._attend_piece(inputs, start, cache, layer, shard), cache
        if options.gates == "prefill":
            kept = self._kept(cache, start, layer, inputs.query.shape[2], shard)
            return self._attend_one(inputs.query, [kept]), cache
        chosen, _ = choose(options, self._scored_queries(inputs, cache, layer))
        most = options.most_blocks(chosen.shape[-1])
        size = options.block_size
        key, value, places = _pooled_cache.gather(cache, chosen[:, :, 0], size, most, layer)
        visible = (0 <= places) & (places <= start[:, None, None])
        return self._attend_one(inputs.query, [(lambda _: (key, value, visible), 1)]), cache

    def _scored_queries(self, inputs: Inputs, cache: Cache, layer: Any) -> Scored:
        """Scores of single queries of each sequence."""
        positions = inputs.positions[0]
        queries = self.gate.queries(inputs.unrotated_query, positions)
        own = positions // self.options.block_size
        return self._scored_rows(queries, own, jnp.ones(positions.shape, bool), cache, layer)

    def _scored_blocks(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any
    ) -> Scored:
        """Scores of blocks of queries, which the first begins, among blocks up to the last."""
        size, pools = self.options.block_size, self.options.query_pools
        is_token = inputs.weights[0] > 0
        # What fills a row up is another document to its last block.
        ids = is_token.astype(jnp.int32)
        query, positions = inputs.unrotated_query, inputs.positions[0]
        rows = _pooled_blocks.pooled(query, positions, ids, size, pools, "first")
        queries = self.gate.queries(rows.vectors, rows.positions)
        own = positions[:, ::size] // size
        scored = self._scored_rows(queries, own, rows.is_kept, cache, layer)
        num_blocks = -(-(start + jnp.sum(is_token, axis=1)) // size)
        return dataclasses.replace(scored, num_blocks=num_blocks)

    def _scored_rows(
        self, queries: jax.Array, own: jax.Array, is_kept: jax.Array, cache: Cache, layer: Any
    ) -> Scored:
        scores = _gates.scores(queries, cache["block_key"][layer])
        block, own = jnp.arange(scores.shape[-1]), own[:, None, :, None]
        return Scored(scores, block < own, block == own, is_kept)

    def _attend_piece(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any, shard: Shard
    ) -> Float[Array, "B T N H"]:
        """Attention of several queries a sequence, which start anywhere."""
        options = self.options
        if options.gates == "prefill":
            chosen, _ = choose(options, self._scored_blocks(inputs, start, cache, layer))
            is_dense = start % options.block_size != 0
            chosen = chosen | is_dense[:, None, None, None]
            return self._attend_maps(inputs, chosen, start, cache, layer)

        def attended(inputs: Inputs, _shard: Shard) -> jax.Array:
            chosen, _ = choose(options, self._scored_queries(inputs, cache, layer))
            start, most = inputs.positions[0][:, 0], options.most_blocks(chosen.shape[-1])
            return self._attend_maps(inputs, chosen, start, cache, layer, most)

        return _query_chunks.mapped(attended, inputs, shard)

    def _attend_maps(
        self,
        inputs: Inputs,
        chosen: Bool[Array, "B n M J"],
        start: Int[Array, " B"],
        cache: Cache,
        layer: Any,
        capacity: int | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention to the tokens of the cache, of each sequence to a map of its own."""

        def row(query: Any, key: Any, value: Any, chosen: Any, start: Any) -> jax.Array:
            inputs = Inputs(query[None], key[None], value[None])
            return self._attend_map(inputs, chosen[None], start, capacity)[0]

        key, value = (cache[name][layer] for name in _cache.KEYS)
        return jax.vmap(row)(inputs.query, key, value, chosen, start)
