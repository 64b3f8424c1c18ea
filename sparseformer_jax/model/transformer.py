"""The transformer: embedding, scanned stacks of blocks, output head."""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sparseformer_jax import mesh
from sparseformer_jax.attention.base import Attention
from sparseformer_jax.model.block import Block, layer_kinds
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import (
    Embedding,
    Norm,
    Projection,
    dropout,
    in_use,
    project,
    soft_cap,
)
from sparseformer_jax.model.stack import (
    LayerStack,
    group_layers,
    join_reports,
    layer_keys,
    prefixed,
)
from sparseformer_jax.sparsity.layers import LayerWeights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a transformer returns.

    Attributes:
      logits: [B, T, V], of the next token, or of the same one when not causal.
      losses: auxiliary losses by name, summed over layers and tokens, each token times its
        weight: what `cross_entropy` returns the like of.
      diagnostics: by name, one number for each layer that reports it, in layer order.
      statistics: sums over tokens from which variables learn, in training, named and stacked
        as variables are: "stacks/0/unit/0/attention/counts".
    """

    logits: Any
    losses: dict[str, Any]
    diagnostics: dict[str, Any]
    statistics: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What a transformer knows before its output head.

    Attributes:
      hidden: [B, T, D], the normalised residual stream after the last layer.
      losses: as in `ModelOutput`, and so are the others.
      diagnostics: by layer.
      statistics: sums over tokens.
    """

    hidden: Any
    losses: dict[str, Any]
    diagnostics: dict[str, Any]
    statistics: dict[str, Any]


class Transformer(nnx.Module):
    """A decoder, or an encoder when `config.is_causal` is False, with the given attention.

    Args:
      config: settings.
      attention: the method.
      options: of the method.
      marks: one a layer; layers of different marks are not stacked together. None: equal.
      sparse_weights: of each layer, which of its weights are sparse. None: none is.
      rngs: random streams for the parameters; those of a layer follow from its number.

    Attributes:
      step: of training, a scalar; what follows a schedule reads it.
      sparsity_key: of the step's noise in sparse weights, which are made as training has them;
        None: weights are used as they are.

    Raises:
      ValueError: `position` is "learned" and a sequence is longer than `max_positions`, or,
        called outside jit, a token id is not below `vocab_size`.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: type[Attention],
        options: Any,
        *,
        marks: Sequence[Hashable] | None = None,
        sparse_weights: Sequence[LayerWeights | None] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.step: Any = 0
        self.sparsity_key: Any = None
        self.embedding = Embedding(config.vocab_size, ("vocab", "embed"), config, rngs=rngs)
        self.position_embedding = (
            Embedding(config.max_positions, (None, "embed"), config, rngs=rngs)
            if config.position == "learned"
            else None
        )
        groups = group_layers(layer_kinds(config, attention, options, marks, sparse_weights))
        sizes = [len(unit) * repeats for unit, repeats in groups]
        keys = _split_rows(layer_keys(rngs.params(), config.num_layers), sizes)
        self.stacks = nnx.List(
            [
                LayerStack(
                    [kind.block for kind in unit],
                    own_keys,
                    config.remat,
                )
                for (unit, _), own_keys in zip(groups, keys, strict=True)
            ]
        )
        self.final_norm = Norm(config.embed_dim, config.norm, config)
        self.head = (
            None
            if config.tie_embeddings
            else Projection(
                (config.embed_dim,),
                (config.vocab_size,),
                ("embed", "vocab"),
                config,
                use_bias=False,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        weights: Float[Array, "B T"] | None = None,
        *,
        rng: Key[Array, ""] | None = None,
    ) -> ModelOutput:
        """Returns logits and what layers report; the arguments are `features`'."""
        features = self.features(tokens, positions, segment_ids, weights, rng=rng)
        logits = self.logits(features.hidden, self.output_kernel())
        return ModelOutput(logits, features.losses, features.diagnostics, features.statistics)

    def features(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        weights: Float[Array, "B T"] | None = None,
        *,
        rng: Key[Array, ""] | None = None,
    ) -> Features:
        """Returns what the output head reads, and what layers report.

        Args:
          tokens: token ids below `vocab_size`; under jit, where values are not known, one
            beyond it takes the last row of the embedding, as indexing does in JAX.
          positions: of each token in its document; None: 0, 1, ..., T-1.
          segment_ids: document of each token, which attention does not leave; None: one.
          weights: of each token in auxiliary losses and statistics; None: 1.
          rng: randomness for training; None: no dropout and no statistics.
        """
        _check_vocabulary(tokens, self.config.vocab_size)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            positions = mesh.shard(positions, "batch", "seq")
        embed_rng, layers_rng = (None, None) if rng is None else jax.random.split(rng)
        x = dropout(self.embed(tokens, positions), self.config.dropout, embed_rng)
        reports = []
        keys = zip(self._layer_keys(layers_rng), self._layer_keys(self.sparsity_key), strict=True)
        for index, (stack, own_keys) in enumerate(zip(self.stacks, keys, strict=True)):
            rng, sparsity_keys = own_keys
            x, report = stack(x, positions, segment_ids, rng, self.step, weights, sparsity_keys)
            statistics = prefixed(report.statistics, f"stacks/{index}")
            reports.append(dataclasses.replace(report, statistics=statistics))
        joined = join_reports(reports)
        return Features(self.final_norm(x), joined.losses, joined.diagnostics, joined.statistics)

    def init_cache(self, batch_size: int, size: int) -> list[Any]:
        """Returns the empty cache of so many sequences of at most `size` tokens each.

        Raises:
          ValueError: positions are learned, and there are fewer.
        """
        self._check_length(size)
        return [stack.init_cache(batch_size, size) for stack in self.stacks]

    def decode(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, " B"],
        cache: list[Any],
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """Returns what the output head reads of the next tokens, and the cache with them.

        To a causal method equal to `features` of the whole sequences, at these tokens.

        Args:
          tokens: the next T of each sequence.
          start: position of the first of them, the number of tokens before.
          cache: of those.
          lengths: how many of the T are the sequence's; those that only fill a row up may be
            anything, and later ones start in their place. None: all.
        """
        x = self.embed(tokens, start[:, None] + jnp.arange(tokens.shape[1]))
        written = []
        for stack, own in zip(self.stacks, cache, strict=True):
            x, own = stack.decode(x, start, own, lengths, self.step)
            written.append(own)
        return self.final_norm(x), written

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream before the first layer; the arguments are `features`'.

        Raises:
          ValueError: positions are learned, and the sequence is longer than they are.
        """
        # Rounded as what it multiplies: so were the models that have it trained.
        x = self.embedding(tokens)
        x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.position_embedding is None:
            return x
        self._check_length(tokens.shape[1])
        return x + self.position_embedding(positions)

    def _check_length(self, num_tokens: int) -> None:
        if self.position_embedding is not None and num_tokens > self.config.max_positions:
            raise ValueError(
                f"a sequence of {num_tokens} tokens exceeds "
                f"model.max_positions={self.config.max_positions}"
            )

    def blocks(self) -> Iterator[Block]:
        """Returns the layers one after another, each with parameters of its own."""
        for stack in self.stacks:
            yield from stack.blocks()

    def attention_layers(self) -> Iterator[Attention]:
        """Returns the attention module of every layer, bottom up; repeats share theirs."""
        for stack in self.stacks:
            for _ in range(stack.repeats):
                block: Any
                for block in stack.unit:
                    yield block.attention

    def output_kernel(self) -> Float[Array, "D V"]:
        """Returns the matrix of the output head, ready for use: cast and gathered."""
        _, dtype = self.config.dtypes
        if self.head is None:
            return in_use(self.embedding.table, dtype).T
        return in_use(self.head.kernel, dtype)

    def logits(
        self, hidden: Float[Array, "B T D"], kernel: Float[Array, "D V"]
    ) -> Float[Array, "B T V"]:
        """Returns the logits of hidden states over the tokens whose columns are given."""
        logits = project(hidden, kernel)
        return soft_cap(logits.astype(self.config.softmax_dtype), self.config.logits_soft_cap)

    def _layer_keys(self, rng: jax.Array | None) -> Sequence[jax.Array | None]:
        """The keys of the layers of each stack."""
        if rng is None:
            return [None] * len(self.stacks)
        sizes = [len(stack.unit) * stack.repeats for stack in self.stacks]
        return _split_rows(layer_keys(rng, sum(sizes)), sizes)


def _check_vocabulary(tokens: jax.Array, vocab_size: int) -> None:
    if isinstance(tokens, jax.core.Tracer) or not tokens.is_fully_addressable or not tokens.size:
        return
    ids = np.asarray(tokens)  # jax's own minimum would be traced where anything is
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"token ids from {lowest} to {highest}: must be from 0 to below"
            f" model.vocab_size={vocab_size}"
        )


def _split_rows(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Cuts the first axis into pieces of the given sizes."""
    ends = list(itertools.accumulate(sizes))
    return [x[end - size : end] for end, size in zip(ends, sizes, strict=True)]
