"""GPT-Neo (Black et al. 2021, doi 10.5281/zenodo.5297715): full and windowed layers in turns.

Learned positions, LayerNorm, and attention logits that nothing scales.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax.pretrained.architectures import _decoder
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.layer_windows import attention_section, read_windows
from sparseformer_jax.pretrained.tables import Architecture, Entry

_LAYER = "transformer.h.{}."
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", f"{theirs}.weight")
    yield Entry(f"{ours}/bias", f"{theirs}.bias")


def _linear(ours: str, theirs: str, in_dims: int = 1) -> Iterator[Entry]:
    yield Entry(f"layers/{{}}/{ours}/kernel", f"{_LAYER}{theirs}.weight", in_dims=in_dims)
    yield Entry(f"layers/{{}}/{ours}/bias", f"{_LAYER}{theirs}.bias")


TABLE = (
    Entry("embedding/table", "transformer.wte.weight"),
    Entry("position_embedding/table", "transformer.wpe.weight"),
    *_norm("final_norm", "transformer.ln_f"),
    Entry("head/kernel", "lm_head.weight", in_dims=1),
    *_norm("layers/{}/attention_norm", f"{_LAYER}ln_1"),
    *_linear("attention/query", "attn.attention.q_proj"),
    *_linear("attention/key", "attn.attention.k_proj"),
    *_linear("attention/value", "attn.attention.v_proj"),
    *_linear("attention/out", "attn.attention.out_proj", in_dims=2),
    *_norm("layers/{}/mlp_norm", f"{_LAYER}ln_2"),
    *_linear("mlp/up", "mlp.c_fc"),
    *_linear("mlp/down", "mlp.c_proj"),
)

# Causal masks, which older versions saved.
_MASKS = (r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",)


def _read(fields: Fields, config: ConfigDict) -> None:
    model = config.model
    model.vocab_size = fields.get("vocab_size", int)
    model.num_layers = fields.get("num_layers", int)
    model.embed_dim = fields.get("hidden_size", int)
    model.num_heads = model.num_kv_heads = fields.get("num_heads", int)
    model.head_dim = model.embed_dim // max(1, model.num_heads)
    model.mlp_dim = fields.get("intermediate_size", int, 4 * model.embed_dim)
    model.position, model.max_positions = "learned", fields.get("max_position_embeddings", int)
    model.norm, model.norm_eps = "layernorm", fields.get("layer_norm_epsilon", float, 1e-5)
    fields.require("activation_function", *_ACTIVATIONS)
    model.mlp = _ACTIVATIONS[fields.get("activation_function", str, "gelu_new")]
    model.out_bias = model.mlp_bias = True
    model.attention_scale = 1.0
    model.tie_embeddings = fields.get("tie_word_embeddings", bool, True)
    full = _full_layers(fields, model.num_layers)
    window = fields.get("window_size", int, 256)
    config.attention = attention_section(None if len(full) == model.num_layers else window, full)


def _full_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Reads `attention_types`, [[["global", "local"], 12]]: kinds in turns, and how often."""
    groups = fields.get("attention_types", list, [[["global", "local"], 12]])
    kinds: list[str] = []
    for group in groups:
        match group:
            case [list(turn), int(repeats)] if len(turn) * repeats <= num_layers:
                kinds += turn * repeats
            case _:
                raise fields.refuse("attention_types", "must hold pairs of kinds and a number")
    if len(kinds) != num_layers or not set(kinds) <= {"global", "local"}:
        raise fields.refuse("attention_types", f"must name {num_layers} times global or local")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "global")


def _write(config: ConfigDict) -> dict[str, Any]:
    model = config.model
    _decoder.require_plain(
        config,
        position="learned",
        norm="layernorm",
        mlp=("gelu", "gelu_tanh"),
        out_bias=True,
        mlp_bias=True,
        attention_scale=1.0,
    )
    if model.num_kv_heads != model.num_heads or model.head_dim * model.num_heads != model.embed_dim:
        raise ValueError(
            f"model.num_kv_heads={model.num_kv_heads} and model.head_dim={model.head_dim}"
        )
    window, full = read_windows(config)
    kinds = ["global" if layer in full else "local" for layer in range(model.num_layers)]
    return {
        "vocab_size": model.vocab_size,
        "num_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "max_position_embeddings": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": "gelu_new" if model.mlp == "gelu_tanh" else "gelu",
        "attention_types": [[[kind], 1] for kind in kinds],
        "window_size": window or 256,
        "tie_word_embeddings": model.tie_embeddings,
    }


ARCHITECTURES = (
    Architecture(
        model_type="gpt_neo",
        class_name="GPTNeoForCausalLM",
        gguf="",
        table=TABLE,
        read=_read,
        write=_write,
        unused=_MASKS,
    ),
)
