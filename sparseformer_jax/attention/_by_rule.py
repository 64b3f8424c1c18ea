"""Attention that a rule says all of, so that decoding knows what to keep and what to read."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.attention import _cache, _one_query
from sparseformer_jax.attention._block_sparse import BlockSparseAttention
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention.inputs import Inputs, Shard


class RuleAttention(BlockSparseAttention):
    """Attention by `rule` and `window_size` alone; a method whose rule forgets overrides `span`."""

    @property
    def span(self) -> int | None:
        """The last tokens written, of which the next ones may see any; None: all."""
        return self.window_size

    def init_cache(self, batch_size: int, size: int, num_layers: int = 1) -> Cache:
        """Returns the empty cache of so many sequences, of the last `span` of `size` tokens."""
        return super().init_cache(batch_size, min(size, self.span or size), num_layers)

    def _decode(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any, shard: Shard
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Attends from one token a sequence in one pass over what the longest has written."""
        num_queries = inputs.query.shape[1]
        if num_queries > 1:
            if self.span is None:
                return super()._decode(inputs, start, cache, layer, shard)
            unit = self.rule().block_size or 1
            seen, offset, cache = _cache.push(cache, inputs, start, layer, unit)
            return self._attend_rows(seen, offset, num_queries, shard), cache
        cache = _cache.write(cache, inputs, start, layer)
        kept = self._kept(cache, start, layer, inputs.query.shape[2], shard)
        return self._attend_one(inputs.query, [kept]), cache

    def _kept(
        self, cache: Cache, start: Int[Array, " B"], layer: Any, num_heads: int, shard: Shard
    ) -> _one_query.Part:
        """The places of the last tokens, for queries at `start`, the last of all."""
        size = cache["key"].shape[2]

        def chunk(index: Any) -> _one_query.Chunk:
            key, value, places = _cache.read_chunk(cache, _cache.KEYS, layer, index)
            positions = start[:, None] - (start[:, None] - places) % size  # the last written there
            positions = jnp.where(places < 0, -1, positions)[:, None]
            return key, value, self._visible(start, positions, num_heads, shard)

        width = _cache.chunk_width(size)
        if width == size:
            return chunk, 1
        return chunk, jnp.minimum(jnp.max(start), size - 1) // width + 1
