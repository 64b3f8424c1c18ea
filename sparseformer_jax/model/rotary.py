"""Rotary positions: which part of a head turns how fast, and how far it reaches."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax.model.config import ModelConfig


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T N H"]:
    """Returns x with the halves of its first R entries rotated by positions * f_i.

        (x_i, x_{i+R/2}) -> a (x_i cos - x_{i+R/2} sin, x_{i+R/2} cos + x_i sin)

    R is H `partial_rotary_factor`, a that of yarn or 1; the other entries stay as they are.

    Source: Su et al. 2021 (RoFormer), section 3.2, in the half-split layout of Llama.
    """
    size = config.rotary_dim
    rotated, rest = x[..., :size], x[..., size:]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(config)  # [B, T, 1, R/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.rope_scaling == "yarn":
        cos, sin = cos * attention_factor(config), sin * attention_factor(config)
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if size < x.shape[-1] else rotated


def frequencies(config: ModelConfig) -> Float[Array, "half"]:
    """Returns the angle of each pair a token, in radians: theta^(-2i/R), scaled.

        linear  f / s                     Chen et al. 2023, arXiv 2306.15595
        llama3  f (m + (1 - m) / s),  m = clip((P f / 2 pi - low) / (high - low), 0, 1)
                                          Llama Team 2024, arXiv 2407.21783, as released
        yarn    f (m + (1 - m) / s),  m = 1 - clip((i - d(fast)) / (d(slow) - d(fast)), 0, 1),
                d(n) = R log(P / 2 pi n) / 2 log(theta), the pair that turns n times in P tokens
                                          Peng et al. 2023, arXiv 2309.00071, as released

    with s = `rope_factor` and P = `rope_original_positions`.
    """
    half = config.rotary_dim // 2
    unscaled = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling == "none":
        return unscaled
    if config.rope_scaling == "linear":
        return unscaled / config.rope_factor
    kept = _kept_by_llama3(unscaled, config)
    if config.rope_scaling == "yarn":
        kept = _kept_by_yarn(half, config)
    return unscaled * (kept + (1 - kept) / config.rope_factor)


def attention_factor(config: ModelConfig) -> float:
    """Returns what yarn multiplies queries and keys by, 0.1 log(s) + 1 unless set."""
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return 0.1 * math.log(config.rope_factor) + 1


def _kept_by_llama3(unscaled: jax.Array, config: ModelConfig) -> jax.Array:
    """How much of each frequency stays: all of those that turn often in P tokens."""
    turns = config.rope_original_positions * unscaled / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    return jnp.clip((turns - low) / (high - low), 0, 1)


def _kept_by_yarn(half: int, config: ModelConfig) -> jax.Array:
    """The same, along a ramp over whole pairs."""

    def pair(turns: float) -> float:
        tokens = config.rope_original_positions / (2 * math.pi * turns)
        return half * math.log(tokens) / math.log(config.rope_theta)

    first = max(math.floor(pair(config.rope_beta_fast)), 0)
    last = min(math.ceil(pair(config.rope_beta_slow)), 2 * half - 1)
    width = max(last - first, 0.001)  # a step, where both are one pair
    return 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / width, 0, 1)
