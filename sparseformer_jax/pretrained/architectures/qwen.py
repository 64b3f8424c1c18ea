"""Qwen2 (Yang et al. 2024, arXiv 2407.10671) and Qwen3 (Yang et al. 2025, arXiv 2505.09388).

Qwen2 has biases in its queries, keys and values; Qwen3 normalises queries and keys instead.
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
from sparseformer_jax.pretrained.tables import Architecture


def _read_shared(fields: Fields, config: ConfigDict) -> None:
    fields.require("hidden_act", "silu")
    _decoder.read_sizes(fields, config.model)
    _decoder.read_rope(fields, config.model)
    num_layers = config.model.num_layers
    uses_window = fields.get("use_sliding_window", bool, False)
    window = _decoder.read_window(fields) if uses_window else None
    first = num_layers if window is None else fields.get("max_window_layers", int, 28)
    full = layers_by_type(fields, num_layers, range(min(first, num_layers)))
    if window is None and len(full) < num_layers:
        raise fields.refuse("layer_types", "names windows, but sliding_window is none")
    config.attention = attention_section(None if len(full) == num_layers else window, full)


def _write_shared(config: ConfigDict) -> dict[str, Any]:
    window, full = read_windows(config)
    return {
        **_decoder.write_sizes(config),
        **_decoder.write_rope(config),
        "hidden_act": "silu",
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": len(full),
        "layer_types": layer_types(config, full),
    }


def _read_qwen2(fields: Fields, config: ConfigDict) -> None:
    _read_shared(fields, config)
    config.model.qkv_bias = True


def _write_qwen2(config: ConfigDict) -> dict[str, Any]:
    _decoder.require_plain(config, qkv_bias=True)
    return _write_shared(config)


def _read_qwen3(fields: Fields, config: ConfigDict) -> None:
    _read_shared(fields, config)
    config.model.qk_norm = True
    config.model.qkv_bias = config.model.out_bias = fields.get("attention_bias", bool, False)


def _write_qwen3(config: ConfigDict) -> dict[str, Any]:
    model = config.model
    _decoder.require_plain(config, qk_norm=True, qkv_bias=model.out_bias, out_bias=model.qkv_bias)
    return _write_shared(config) | {"attention_bias": model.qkv_bias}


ARCHITECTURES = (
    Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        gguf="qwen2",
        table=(*_decoder.TABLE, _decoder.MLP_NORM),
        read=_read_qwen2,
        write=_write_qwen2,
        unused=_decoder.UNUSED,
    ),
    Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        gguf="qwen3",
        table=(*_decoder.TABLE, *_decoder.QK_NORMS, _decoder.MLP_NORM),
        read=_read_qwen3,
        write=_write_qwen3,
        unused=_decoder.UNUSED,
    ),
)
