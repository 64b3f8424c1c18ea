"""A block of the transformer, and all that may differ between its layers."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention.base import Attention
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import Mlp, Norm, dropout
from sparseformer_jax.model.stack import Reports, prefixed
from sparseformer_jax.sparsity.layers import LayerWeights


class Block(nnx.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    With `post_norm` x + norm(attention(norm(x))), and the MLP alike (Gemma 2, arXiv 2408.00118).
    """

    def __init__(
        self, config: ModelConfig, attention: type[Attention], options: Any, *, rngs: nnx.Rngs
    ) -> None:
        self.dropout = config.dropout
        self.sparse_weights: LayerWeights | None = None
        # Apart, so that a method with parameters of its own leaves the others as they are.
        attention_rngs, mlp_rngs = nnx.Rngs(rngs.params()), nnx.Rngs(rngs.params())
        self.attention_norm = Norm(config.embed_dim, config.norm, config)
        self.attention = attention(config, options, rngs=attention_rngs)
        self.mlp_norm = Norm(config.embed_dim, config.norm, config)
        self.mlp = Mlp(config, rngs=mlp_rngs)
        self.attention_post_norm, self.mlp_post_norm = (
            Norm(config.embed_dim, config.norm, config) if config.post_norm else None
            for _ in range(2)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        rng: Key[Array, ""] | None,
        step: Any = 0,
        weights: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Reports]:
        """Returns the residual stream after the block, and what attention reported."""
        rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        attended = self.attention(
            self.attention_norm(x), positions, segment_ids, weights, step=step, rng=rngs[0]
        )
        x = self._add(x, attended.output, rngs[1:])
        statistics = prefixed(attended.statistics, "attention")
        return x, Reports(attended.losses, attended.diagnostics, statistics)

    def decode(
        self,
        x: Float[Array, "B T D"],
        start: Int[Array, " B"],
        cache: Cache,
        lengths: Int[Array, " B"] | None,
        layer: Any,
        step: Any,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Returns the residual stream of the next tokens, and the cache with them."""
        attended, cache = self.attention.decode(
            self.attention_norm(x), start, cache, lengths, layer=layer, step=step
        )
        return self._add(x, attended, (None, None)), cache

    def _add(self, x: jax.Array, attended: jax.Array, rngs: Any) -> jax.Array:
        """Adds what attention returned to the residual stream, then the MLP of that."""
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        x = x + dropout(attended, self.dropout, rngs[0])
        added = self.mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            added = self.mlp_post_norm(added)
        return x + dropout(added, self.dropout, rngs[1])


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """All that may differ between layers: those of one kind are stacked, and scan.

    Attributes:
      config: settings of the layer.
      attention: its method.
      options: of the method.
      sparse_weights: which of its weights are sparse, and how; None: none is.
      mark: anything else.
    """

    config: ModelConfig
    attention: type[Attention]
    options: Any
    sparse_weights: LayerWeights | None
    mark: Hashable

    def block(self, *, rngs: nnx.Rngs) -> Block:
        """Returns a layer of the kind."""
        block = Block(self.config, self.attention, self.options, rngs=rngs)
        if self.sparse_weights is not None:
            self.sparse_weights.attach(block)
            block.sparse_weights = self.sparse_weights
        return block


def layer_kinds(
    config: ModelConfig,
    attention: type[Attention],
    options: Any,
    marks: Sequence[Hashable] | None = None,
    sparse_weights: Sequence[LayerWeights | None] | None = None,
) -> list[LayerKind]:
    """Returns the kind of each layer; the arguments are those of `Transformer`."""
    methods = attention.layer_kinds(options, config.num_layers)
    nothing = [None] * config.num_layers
    each = zip(methods, sparse_weights or nothing, marks or nothing, strict=True)
    return [
        LayerKind(config.of_layer(layer), method, own, sparse, mark)
        for layer, ((method, own), sparse, mark) in enumerate(each)
    ]
