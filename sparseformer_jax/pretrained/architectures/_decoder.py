"""What decoders since Llama share: names of settings and weights, sizes, rotary positions."""

from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.tables import Entry

_LAYER = "model.layers.{}."

# Weights that every one of them has; norms around sublayers differ and are each family's own.
TABLE = (
    Entry("embedding/table", "model.embed_tokens.weight", "token_embd.weight"),
    Entry("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    Entry("head/kernel", "lm_head.weight", "output.weight", in_dims=1),
    *(
        Entry(
            f"layers/{{}}/attention/{ours}/{kind}",
            f"{_LAYER}self_attn.{theirs}.{weight}",
            f"blk.{{}}.{gguf}.{weight}",
            in_dims if kind == "kernel" else None,
        )
        for ours, theirs, gguf, in_dims in (
            ("query", "q_proj", "attn_q", 1),
            ("key", "k_proj", "attn_k", 1),
            ("value", "v_proj", "attn_v", 1),
            ("out", "o_proj", "attn_output", 2),
        )
        for kind, weight in (("kernel", "weight"), ("bias", "bias"))
    ),
    *(
        Entry(
            f"layers/{{}}/mlp/{name}/{kind}",
            f"{_LAYER}mlp.{name}_proj.{weight}",
            f"blk.{{}}.ffn_{name}.{weight}",
            1 if kind == "kernel" else None,
        )
        for name in ("gate", "up", "down")
        for kind, weight in (("kernel", "weight"), ("bias", "bias"))
    ),
    Entry(
        "layers/{}/attention_norm/scale",
        f"{_LAYER}input_layernorm.weight",
        "blk.{}.attn_norm.weight",
    ),
)

QK_NORMS = (
    Entry(
        "layers/{}/attention/query_norm/scale",
        f"{_LAYER}self_attn.q_norm.weight",
        "blk.{}.attn_q_norm.weight",
    ),
    Entry(
        "layers/{}/attention/key_norm/scale",
        f"{_LAYER}self_attn.k_norm.weight",
        "blk.{}.attn_k_norm.weight",
    ),
)

# The norm before the MLP, where no other stands between it and attention.
MLP_NORM = Entry(
    "layers/{}/mlp_norm/scale",
    f"{_LAYER}post_attention_layernorm.weight",
    "blk.{}.ffn_norm.weight",
)

# What files hold beside the weights: rotary tables, which settings tell, too.
UNUSED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rope_freqs\.weight")

# Names here, in config.json, and kinds; all must be there.
_SIZES = (
    ("vocab_size", "vocab_size"),
    ("num_layers", "num_hidden_layers"),
    ("embed_dim", "hidden_size"),
    ("num_heads", "num_attention_heads"),
    ("mlp_dim", "intermediate_size"),
    ("max_positions", "max_position_embeddings"),
)

# Settings of ours that a family has at these values unless it says otherwise.
_PLAIN: dict[str, Any] = {
    "is_causal": True,
    "position": "rope",
    "norm": "rmsnorm",
    "norm_unit_offset": False,
    "post_norm": False,
    "mlp": "swiglu",
    "qk_norm": False,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "embedding_scale": 1.0,
    "attention_scale": None,
    "attention_soft_cap": None,
    "logits_soft_cap": None,
    "rope_local_theta": None,
    "partial_rotary_factor": 1.0,
}


def read_sizes(fields: Fields, model: ConfigDict, *, ties: bool = False) -> None:
    """Sets the sizes of a model, its norms' epsilon and whether embeddings are tied.

    Args:
      fields: of config.json.
      model: the section to set.
      ties: whether embeddings are tied where the file does not say.
    """
    for ours, theirs in _SIZES:
        model[ours] = fields.get(theirs, int)
    heads = max(1, model.num_heads)  # config_ranges refuses 0
    model.num_kv_heads = fields.get("num_key_value_heads", int, model.num_heads)
    model.head_dim = fields.get("head_dim", int, model.embed_dim // heads)
    model.norm_eps = fields.get("rms_norm_eps", float, 1e-6)
    model.tie_embeddings = fields.get("tie_word_embeddings", bool, ties)


def write_sizes(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that `read_sizes` reads."""
    model = config.model
    return {theirs: model[ours] for ours, theirs in _SIZES} | {
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


def require_plain(config: ConfigDict, **other: Any) -> None:
    """Checks that a model has what a family has, at plain values but for `other`.

    Raises:
      ValueError: it has not.
    """
    model = config.model
    for key, value in (_PLAIN | other).items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key == "attention_scale" and value is None:
            allowed = (None, model.head_dim**-0.5)
        if model[key] not in allowed:
            raise ValueError(f"model.{key}={model[key]!r}, not {value!r}")


def read_window(fields: Fields) -> int | None:
    """Returns `sliding_window`, which is 4096 where it is absent and none where it is null."""
    name = "sliding_window"
    return None if fields.is_null(name) else fields.get(name, int, 4096)


def read_rope(fields: Fields, model: ConfigDict, theta: float = 10000.0) -> None:
    """Sets rotary positions by `rope_parameters`, or as older files have it in several fields."""
    rope = fields.section("rope_parameters")
    if "rope_parameters" not in fields:
        rope = fields.section("rope_scaling")
        theta = fields.get("rope_theta", float, theta)
    model.rope_theta = rope.get("rope_theta", float, theta)
    fraction = fields.get("partial_rotary_factor", float, 1.0)
    model.partial_rotary_factor = rope.get("partial_rotary_factor", float, fraction)
    read_scaling(rope, model)


def read_scaling(rope: Fields, model: ConfigDict) -> None:
    """Sets the scaling of rotary positions."""
    rope.require("type", "default", "linear", "llama3", "yarn")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    rope.require("rope_type", "default", "linear", "llama3", "yarn")
    if kind == "default":
        return
    model.rope_scaling = kind
    model.rope_factor = rope.get("factor", float)
    if kind == "linear":
        return
    name = "original_max_position_embeddings"
    model.rope_original_positions = rope.get(name, int, model.max_positions)
    if kind == "llama3":
        model.rope_low_freq_factor = rope.get("low_freq_factor", float)
        model.rope_high_freq_factor = rope.get("high_freq_factor", float)
        return
    for name in ("mscale", "mscale_all_dim"):
        rope.require(name)
    rope.require("truncate", True)
    model.rope_beta_fast = rope.get("beta_fast", float, 32.0)
    model.rope_beta_slow = rope.get("beta_slow", float, 1.0)
    model.rope_attention_factor = rope.get("attention_factor", float, None)


def write_rope(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that `read_rope` reads."""
    rope = {"rope_theta": config.model.rope_theta, **write_scaling(config.model)}
    return {"rope_parameters": rope}


def write_scaling(model: ConfigDict) -> dict[str, Any]:
    """Returns the scaling of rotary positions."""
    scaling: dict[str, Any] = {"rope_type": model.rope_scaling}
    if model.rope_scaling == "none":
        return {"rope_type": "default"}
    scaling["factor"] = model.rope_factor
    if model.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = model.rope_original_positions
    if model.rope_scaling == "llama3":
        scaling["low_freq_factor"] = model.rope_low_freq_factor
        scaling["high_freq_factor"] = model.rope_high_freq_factor
    if model.rope_scaling == "yarn":
        scaling["beta_fast"] = model.rope_beta_fast
        scaling["beta_slow"] = model.rope_beta_slow
        if model.rope_attention_factor is not None:
            scaling["attention_factor"] = model.rope_attention_factor
    return scaling
