"""Gemma 3, text models (Gemma Team 2025, arXiv 2503.19786).

Norms around both sublayers scale by 1 + weight, embeddings are scaled by sqrt(D), and five
layers with a window and a rotary base of their own stand to one full layer.
"""

from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax.pretrained.architectures import _decoder
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.layer_windows import (
    attention_section,
    layer_types,
    layers_by_type,
    read_windows,
)
from sparseformer_jax.pretrained.tables import Architecture, Entry, with_form

_LAYER = "model.layers.{}."

# GGUF files have 1 + weight.
TABLE = with_form(
    (
        *_decoder.TABLE,
        *_decoder.QK_NORMS,
        Entry(
            "layers/{}/attention_post_norm/scale",
            f"{_LAYER}post_attention_layernorm.weight",
            "blk.{}.post_attention_norm.weight",
        ),
        Entry(
            "layers/{}/mlp_norm/scale",
            f"{_LAYER}pre_feedforward_layernorm.weight",
            "blk.{}.ffn_norm.weight",
        ),
        Entry(
            "layers/{}/mlp_post_norm/scale",
            f"{_LAYER}post_feedforward_layernorm.weight",
            "blk.{}.post_ffw_norm.weight",
        ),
    ),
    {"norm/scale": "plus_one"},
)

# GGUF files do not tell what scales queries: 1/sqrt(H), but in the 27B model, of 62 layers,
# 1/sqrt(D/N).
_LAYERS_OF_27B = 62


def _read(fields: Fields, config: ConfigDict) -> None:
    model = config.model
    fields.require("hidden_activation", "gelu_pytorch_tanh")
    fields.require("use_bidirectional_attention", False)
    _decoder.read_sizes(fields, model, ties=True)
    model.mlp = "geglu_tanh"
    model.qk_norm = model.post_norm = model.norm_unit_offset = True
    model.qkv_bias = model.out_bias = fields.get("attention_bias", bool, False)
    model.embedding_scale = model.embed_dim**0.5
    by_heads = model.embed_dim / max(1, model.num_heads)
    scalar = by_heads if model.num_layers == _LAYERS_OF_27B else float(model.head_dim)
    model.attention_scale = max(1e-9, fields.get("query_pre_attn_scalar", float, scalar)) ** -0.5
    model.attention_soft_cap = fields.get("attn_logit_softcapping", float, None)
    model.logits_soft_cap = fields.get("final_logit_softcapping", float, None)
    period = max(1, fields.get("sliding_window_pattern", int, 6))
    every = range(period - 1, model.num_layers, period)
    full = layers_by_type(fields, model.num_layers, every)
    local = tuple(layer for layer in range(model.num_layers) if layer not in full)
    window = fields.get("sliding_window", int, 4096) if local else None
    config.attention = attention_section(window, full)
    _read_rope(fields, model, local)


def _read_rope(fields: Fields, model: ConfigDict, local: tuple[int, ...]) -> None:
    rope = fields.section("rope_parameters")
    if "rope_parameters" in fields:
        full, windows = rope.section("full_attention"), rope.section("sliding_attention")
        windows.require("rope_type", "default")
        model.rope_theta = full.get("rope_theta", float, 1e6)
        local_theta = windows.get("rope_theta", float, 1e4)
        _decoder.read_scaling(full, model)
    else:
        _decoder.read_rope(fields, model, theta=1e6)
        local_theta = fields.get("rope_local_base_freq", float, 1e4)
    if local:
        model.rope_local_layers, model.rope_local_theta = local, local_theta


def _write(config: ConfigDict) -> dict[str, Any]:
    model = config.model
    _decoder.require_plain(
        config,
        mlp="geglu_tanh",
        qk_norm=True,
        post_norm=True,
        norm_unit_offset=True,
        embedding_scale=model.embed_dim**0.5,
        qkv_bias=model.out_bias,
        out_bias=model.qkv_bias,
        attention_scale=model.attention_scale,
        attention_soft_cap=model.attention_soft_cap,
        logits_soft_cap=model.logits_soft_cap,
        rope_local_theta=model.rope_local_theta,
    )
    window, full = read_windows(config)
    local = tuple(layer for layer in range(model.num_layers) if layer not in full)
    if model.rope_local_layers != local:
        raise ValueError(f"model.rope_local_layers={model.rope_local_layers}, not those of windows")
    # config.json holds the number itself, often an integer, and the power is rounded.
    scalar = model.head_dim if model.attention_scale is None else model.attention_scale**-2
    full_rope = {"rope_theta": model.rope_theta, **_decoder.write_scaling(model)}
    local_theta = model.rope_local_theta or 1e4
    return {
        **_decoder.write_sizes(config),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": model.qkv_bias,
        "query_pre_attn_scalar": _whole(scalar),
        "attn_logit_softcapping": model.attention_soft_cap,
        "final_logit_softcapping": model.logits_soft_cap,
        "sliding_window": window,
        "layer_types": layer_types(config, full),
        "rope_parameters": {
            "full_attention": full_rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _whole(scalar: float) -> int | float:
    return round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar


ARCHITECTURES = (
    Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        gguf="gemma3",
        table=TABLE,
        read=_read,
        write=_write,
        unused=_decoder.UNUSED,
    ),
)
