"""Builds what a config describes: the model, and the tokenizer that fits it."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from flax import nnx
from ml_collections import ConfigDict

from sparseformer_jax import registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.transformer import Transformer
from sparseformer_jax.sparsity.layers import LayerWeights

if TYPE_CHECKING:
    from sparseformer_jax.data import Tokenizer


def make_model(
    config: ConfigDict,
    *,
    marks: Sequence[Hashable] | None = None,
    sparse_weights: Sequence[LayerWeights | None] | None = None,
    rngs: nnx.Rngs,
) -> Transformer:
    """Returns the transformer of a config, freshly initialised; what layers have as it takes it.

    Raises:
      ValueError: the attention method or one of its options is unknown.
    """
    method = registry.method("attention", config.attention.name)
    options = registry.options("attention", config.attention)
    model = ModelConfig(**config.model)
    return Transformer(
        model, method.Method, options, marks=marks, sparse_weights=sparse_weights, rngs=rngs
    )


def make_tokenizer(config: ConfigDict) -> "Tokenizer":
    """Returns the tokenizer of a config.

    Raises:
      ConfigError: the model has no row for some of its tokens.
    """
    from sparseformer_jax import data  # Models need no data libraries.

    tokenizer = data.make_tokenizer(config.data)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: less than the {tokenizer.vocab_size} "
            f"tokens of data.tokenizer={config.data.tokenizer!r}; make it that or more"
        )
    return tokenizer
