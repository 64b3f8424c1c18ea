"""Llama (Touvron et al. 2023, arXiv 2302.13971) and Mistral (Jiang et al. 2023, arXiv 2310.06825).

SmolLM2, TinyLlama and others are Llamas, too. Mistral's first version attends in a window.
"""

from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax.pretrained.architectures import _decoder
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.layer_windows import attention_section, read_windows
from sparseformer_jax.pretrained.tables import Architecture, with_form

# GGUF files have the rows of queries and keys in the order in which Meta rotates them.
_INTERLEAVED = {"attention/query": "interleaved", "attention/key": "interleaved"}


def _read(fields: Fields, config: ConfigDict) -> None:
    model = config.model
    fields.require("hidden_act", "silu")
    fields.require("pretraining_tp", 1)
    _decoder.read_sizes(fields, model)
    _decoder.read_rope(fields, model)
    model.qkv_bias = model.out_bias = fields.get("attention_bias", bool, False)
    model.mlp_bias = fields.get("mlp_bias", bool, False)


def _write(config: ConfigDict) -> dict[str, Any]:
    model = config.model
    _decoder.require_plain(
        config, qkv_bias=model.out_bias, out_bias=model.qkv_bias, mlp_bias=(0, 1)
    )
    if read_windows(config)[0] is not None:
        raise ValueError("layers with a window")
    return {
        **_decoder.write_sizes(config),
        **_decoder.write_rope(config),
        "hidden_act": "silu",
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
    }


def _read_mistral(fields: Fields, config: ConfigDict) -> None:
    fields.require("hidden_act", "silu")
    _decoder.read_sizes(fields, config.model)
    _decoder.read_rope(fields, config.model)
    config.attention = attention_section(_decoder.read_window(fields), ())


def _write_mistral(config: ConfigDict) -> dict[str, Any]:
    _decoder.require_plain(config)
    window, full = read_windows(config)
    if window is not None and full:
        raise ValueError("layers with a window beside full ones")
    return {
        **_decoder.write_sizes(config),
        **_decoder.write_rope(config),
        "hidden_act": "silu",
        "sliding_window": window,
    }


TABLE = (*_decoder.TABLE, _decoder.MLP_NORM)

ARCHITECTURES = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        gguf="llama",
        table=with_form(TABLE, _INTERLEAVED),
        read=_read,
        write=_write,
        unused=_decoder.UNUSED,
    ),
    Architecture(
        model_type="mistral",
        class_name="MistralForCausalLM",
        gguf="",  # its GGUF files call themselves llama
        table=TABLE,
        read=_read_mistral,
        write=_write_mistral,
        unused=_decoder.UNUSED,
    ),
)
