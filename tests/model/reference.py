"""The transformer written out naively, to be run in float64: the model tests' truth.

Parameters are nested dictionaries of arrays with the model's names; a mask is [N, T, S]
or [B, N, T, S], True where a query head sees a key.
"""

import jax
import jax.numpy as jnp
import numpy as np


def causal(num_tokens):
    return np.tri(num_tokens, dtype=bool)[None]


def same_segment(segment_ids):
    return np.equal(segment_ids[:, None, :, None], segment_ids[:, None, None, :])


def linear(p, x, in_dims=1):
    return jnp.tensordot(x, p["kernel"], in_dims) + p.get("bias", 0)


def norm(p, x, kind, eps, offset=0):
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    scale = offset + p["scale"]
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + p.get("bias", 0)


def rotate(x, positions, theta):
    """Turns the complex number of entries k and k + H/2 by positions * theta^(-2k/H)."""
    half = x.shape[-1] // 2
    z = jax.lax.complex(x[..., :half], x[..., half:])
    angles = positions[..., None, None] * theta ** (-np.arange(half) / half)
    z = z * jnp.exp(1j * angles)
    return jnp.concatenate([z.real, z.imag], axis=-1)


def attention(p, x, positions, mask, config):
    query, key, value = (linear(p[name], x) for name in ("query", "key", "value"))
    if config.qk_norm:
        offset = config.norm_unit_offset
        query = norm(p["query_norm"], query, "rmsnorm", config.norm_eps, offset)
        key = norm(p["key_norm"], key, "rmsnorm", config.norm_eps, offset)
    if config.position == "rope":
        query = rotate(query, positions, config.rope_theta)
        key = rotate(key, positions, config.rope_theta)
    group = config.num_heads // config.num_kv_heads
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scale = config.attention_scale or config.head_dim**-0.5
    logits = scale * jnp.einsum("btnh,bsnh->bnts", query, key)
    if cap := config.attention_soft_cap:
        logits = cap * jnp.tanh(logits / cap)
    weights = jnp.where(mask, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    attended = jnp.einsum("bnts,bsnh->btnh", weights, value)
    return linear(p["out"], attended, 2)


def mlp(p, x, kind):
    up = linear(p["up"], x)
    if kind == "swiglu":
        gate = linear(p["gate"], x)
        hidden = gate / (1 + jnp.exp(-gate)) * up
    elif kind == "gelu":
        hidden = up * (1 + jax.lax.erf(up / 2**0.5)) / 2
    elif kind == "geglu_tanh":
        hidden = gelu_tanh(linear(p["gate"], x)) * up
    else:
        hidden = gelu_tanh(up)
    return linear(p["down"], hidden)


def gelu_tanh(x):
    return x * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def transformer(p, tokens, positions, masks, config):
    """Returns the logits; `masks` has one mask a layer, `p["layers"]` one block."""

    def normalised(p, x):
        return norm(p, x, config.norm, config.norm_eps, config.norm_unit_offset)

    def added(block, name, y):
        return normalised(block[f"{name}_post_norm"], y) if config.post_norm else y

    x = config.embedding_scale * p["embedding"]["table"][tokens]
    if config.position == "learned":
        x = x + p["position_embedding"]["table"][positions]
    for layer, (block, mask) in enumerate(zip(p["layers"], masks, strict=True)):
        own = config.of_layer(layer)
        y = normalised(block["attention_norm"], x)
        y = attention(block["attention"], y, positions, mask, own)
        x = x + added(block, "attention", y)
        y = mlp(block["mlp"], normalised(block["mlp_norm"], x), config.mlp)
        x = x + added(block, "mlp", y)
    x = normalised(p["final_norm"], x)
    logits = x @ p["embedding"]["table"].T if config.tie_embeddings else linear(p["head"], x)
    cap = config.logits_soft_cap
    return cap * jnp.tanh(logits / cap) if cap else logits
