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
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_positions: int = 8192
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float | None = None
    partial_rotary_factor: float = 1.0
    rope_local_layers: tuple[int, ...] = ()
    rope_local_theta: float | None = None
    max_positions: int = 2048
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False
    post_norm: bool = False
    mlp: str = "swiglu"
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
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
    def rotary_dim(self) -> int:
        """Entries of a head that are rotated, an even number."""
        return round(self.head_dim * self.partial_rotary_factor)

    def of_layer(self, layer: int) -> "ModelConfig":
        """Returns the settings of one layer: equal where layers are."""
        own = dataclasses.replace(self, rope_local_layers=(), rope_local_theta=None)
        if self.rope_local_theta is None or layer not in self.rope_local_layers:
            return own
        return dataclasses.replace(own, rope_theta=self.rope_local_theta, rope_scaling="none")

    @property
    def dtypes(self) -> tuple[jnp.dtype, jnp.dtype]:
        """The dtypes of parameters and of computation."""
        return jnp.dtype(self.param_dtype), jnp.dtype(self.compute_dtype)
