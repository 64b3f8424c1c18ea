"""S2-Attention: each head attends to a local band and its own stripes of the context.

With query block m, key block n of P tokens and pattern head h, causal:

    attend <=> n <= m and (m - n < local_blocks or (n + h step + offset) mod stride = 0)

Lin et al. 2024, "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
arXiv 2407.17678, and its kernel library DKernel. Phi-3-small is offset = 1 with phases by
query head, and every second layer dense.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from pallas_kernels.rules import Rule, Strided
from sparseformer_jax.attention import _cache, _stripes, dense
from sparseformer_jax.attention._block_sparse import check_implementation
from sparseformer_jax.attention._by_rule import RuleAttention
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention.base import Attention
from sparseformer_jax.attention.inputs import Inputs, Shard


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of S2-Attention.

    Attributes:
      block_size: P, tokens in a block.
      local_blocks: blocks of the band, the query's own counted.
      local_blocks_right: the same to the right; only bidirectional attention reads it.
      vert_stride: one stripe in this many blocks; 1 is dense.
      head_sliding_offset: added to every phase, in blocks.
      head_sliding_step: from one pattern head's phase to the next; None: vert_stride
        divided by the query heads, at least 1.
      phase_by: what counts as a pattern head: "q_head", or "kv_head" so that the query
        heads of a group share their keys.
      homo_head: all heads take the pattern of head 0.
      num_dense_heads: the last pattern heads that attend densely.
      stripes: "absolute" columns, or "relative" to the query, which bidirectional
        attention may use; the same for every head.
      dense_every: every such layer is dense (layers n - 1, 2 n - 1, ...); 0: none.
      implementation: of the kernel, see `block_sparse_attention`; None: the best here.
    """

    block_size: int = 64
    local_blocks: int = 4
    local_blocks_right: int = 1
    vert_stride: int = 16
    head_sliding_offset: int = 0
    head_sliding_step: int | None = None
    phase_by: Literal["q_head", "kv_head"] = "q_head"
    homo_head: bool = False
    num_dense_heads: int = 0
    stripes: Literal["absolute", "relative"] = "absolute"
    dense_every: int = 0
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "local_blocks", "local_blocks_right", "vert_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("head_sliding_step", "num_dense_heads", "dense_every"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.homo_head and self.num_dense_heads:
            raise ValueError(
                f"num_dense_heads={self.num_dense_heads} needs a pattern for each head; "
                "set homo_head=False"
            )


def check(options: Options, config: ConfigDict) -> None:
    """Refuses what the model cannot do with these options.

    Raises:
      ValueError: implementation is unknown, there are fewer heads than dense ones,
        stripes are relative but the model is causal, or the sequence does not hold whole
        blocks.
    """
    check_implementation(options.implementation)
    model = config.model
    heads = model.num_heads if options.phase_by == "q_head" else model.num_kv_heads
    if options.num_dense_heads > heads:
        raise ValueError(
            f"num_dense_heads={options.num_dense_heads} is more than the {heads} heads that "
            f"phase_by={options.phase_by!r} counts; take at most {heads}"
        )
    if options.stripes == "relative" and model.is_causal:
        raise ValueError("stripes='relative' is bidirectional; set model.is_causal=False")
    if config.data.seq_len % options.block_size:
        raise ValueError(
            f"block_size={options.block_size} must divide data.seq_len={config.data.seq_len}"
        )


class Method(RuleAttention):
    """S2-Attention."""

    cache_axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = dict.fromkeys(
        _stripes.KEYS, ("batch", None, "kv_heads", None)
    )

    @classmethod
    def layer_kinds(
        cls, options: Options, num_layers: int
    ) -> Sequence[tuple[type[Attention], Any]]:
        """Returns dense attention in every `dense_every`-th layer, S2 in the others."""
        every = options.dense_every
        dense_kind = (dense.Method, dense.Options(options.implementation))
        return [
            dense_kind if every and (layer + 1) % every == 0 else (cls, options)
            for layer in range(num_layers)
        ]

    def rule(self) -> Rule:
        """Returns the band and stripes of every pattern head."""
        options = self.options
        return Strided(
            block_size=options.block_size,
            stride=options.vert_stride,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            left=options.local_blocks,
            right=options.local_blocks_right,
            offset=options.head_sliding_offset,
            step=options.head_sliding_step,
            dense_heads=options.num_dense_heads,
            homo_head=options.homo_head,
            phase_by=options.phase_by,
            stripes=options.stripes,
        )

    def init_cache(self, batch_size: int, size: int, num_layers: int = 1) -> Cache:
        """Returns the empty cache: a ring of the band, and each key/value head's stripes.

        Of all tokens, where that is no more.
        """
        stripes, ring = self._stripes(), self.options.local_blocks * self.options.block_size
        if stripes is None or ring + stripes.num_places(size) >= size:
            return super().init_cache(batch_size, size, num_layers)
        cache = super().init_cache(batch_size, ring, num_layers)
        kept = super().init_cache(batch_size, stripes.num_places(size), num_layers)
        return cache | dict(zip(_stripes.KEYS, kept.values(), strict=True))

    def _decode(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any, shard: Shard
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Attends to the band and to the stripes before it."""
        stripes = self._stripes()
        if stripes is None or _stripes.KEYS[0] not in cache:
            return super()._decode(inputs, start, cache, layer, shard)
        num_queries, num_heads, num_kv_heads = inputs.query.shape[1:3] + inputs.key.shape[2:3]
        first = shard.head_offset * self.config.num_kv_heads // self.config.num_heads
        stripes = stripes.take_heads(first, num_kv_heads)
        if num_queries > 1:
            seen, cache = _stripes.push(cache, inputs, start, layer, stripes)
            return self._attend_rows(seen, start, num_queries, shard), cache
        ring = {name: cache[name] for name in _cache.KEYS}
        written = _cache.write(ring, inputs, start, layer)
        cache = written | _stripes.write_one(cache, inputs, start, layer, stripes)

        def visible(positions: jax.Array) -> jax.Array:
            return self._visible(start, positions, num_heads, shard)

        parts = [
            self._kept(cache, start, layer, num_heads, shard),
            _stripes.part(cache, start, layer, stripes, visible),
        ]
        return self._attend_one(inputs.query, parts), cache

    def _stripes(self) -> _stripes.Stripes | None:
        """What is kept for good; None: all."""
        options = self.options
        stride, left = options.vert_stride, options.local_blocks
        return _stripes.of_rule(self.rule(), stride, left, self.config.num_kv_heads)
