"""Attention that a rule says all of, so that decoding knows what it reads of a cache."""

from typing import Any

from jaxtyping import Array, Float, Int

from sparseformer_jax.attention import _cache, _one_query
from sparseformer_jax.attention._block_sparse import BlockSparseAttention
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention.inputs import Inputs, Shard


class RuleAttention(BlockSparseAttention):
    """Attention by `rule` and `window_size` alone."""

    def _decode(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any, shard: Shard
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Attends from one token a sequence in one pass over what the longest has written."""
        if inputs.query.shape[1] > 1:
            return super()._decode(inputs, start, cache, layer, shard)
        cache = _cache.write(cache, inputs, start, layer)
        num_heads = inputs.query.shape[2]

        def chunk(index: Any) -> _one_query.Chunk:
            key, value, positions = _cache.read_chunk(cache, start + 1, layer, index)
            return key, value, self._visible(start, positions, num_heads, shard)

        num_chunks = _cache.num_chunks(cache, start + 1)
        return self._attend_one(inputs.query, chunk, num_chunks), cache
