"""Attention that a rule says all of, so that decoding knows what to keep and what to read."""

from typing import Any

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
        num_queries, num_heads = inputs.query.shape[1:3]
        if num_queries > 1:
            if self.span is None:
                return super()._decode(inputs, start, cache, layer, shard)
            unit = self.rule().block_size or 1
            seen, offset, cache = _cache.push(cache, inputs, start, layer, unit)
            return self._attend_rows(seen, offset, num_queries, shard), cache
        cache = _cache.write(cache, inputs, start, layer)

        def chunk(index: Any) -> _one_query.Chunk:
            key, value, positions = _cache.read_chunk(cache, start, layer, index)
            return key, value, self._visible(start, positions, num_heads, shard)

        return self._attend_one(inputs.query, chunk, _cache.num_chunks(cache, start)), cache
