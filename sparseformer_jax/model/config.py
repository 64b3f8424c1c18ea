"""The settings of a transformer, as the model's code reads them."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Settings of a transformer; the keys of `config.model`, documented in configs/default.py."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    is_causal: bool = True
    position: str = "rope"
    rope_theta: float = 10000.0
    max_positions: int = 2048
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    mlp: str = "swiglu"
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    dropout: float = 0.0
    remat: str = "none"
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @property
    def scale(self) -> float:
        """The factor of the attention logits, 1/sqrt(H) unless set."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def dtypes(self) -> tuple[jnp.dtype, jnp.dtype]:
        """The dtypes of parameters and of computation."""
        return jnp.dtype(self.param_dtype), jnp.dtype(self.compute_dtype)
