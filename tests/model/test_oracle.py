"""The model computes what transformers' Llama, Mistral, Qwen, Gemma 3 and GPT-Neo compute."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax import default_config, registry
from sparseformer_jax.training.state import ModelDef
from tests.model import hugging_face
from tests.model.harness import assert_close

pytestmark = pytest.mark.oracle

# Four query heads in two groups; 31 tokens are more than the windows, and the rotary pairs turn
# from 5 times to hardly at all in them.
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-4,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
OURS = {
    "vocab_size": 53,
    "embed_dim": 24,
    "mlp_dim": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "norm_eps": 1e-4,
    "rope_theta": 500.0,
    "tie_embeddings": False,
}
WINDOW = {"span": "window", "span_size": 7}


def rope(kind="default", **settings):
    return {"rope_type": kind, "rope_theta": 500.0, **settings}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of theirs and the same of ours.

    Attributes:
      family: of models, as their config class has it.
      theirs: what differs from `SIZES`, None: left out.
      ours: what differs from `OURS`.
      attention: options of MASFormer, which has the windows; None: dense.
      table: of names.
    """

    family: str
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)
    attention: dict[str, Any] | None = None
    table: dict[str, str] = dataclasses.field(default_factory=lambda: hugging_face.LLAMA)

    def model(self, transformers: Any) -> Any:
        """Their model, with noise on all its parameters."""
        import torch

        settings = {"rope_parameters": rope(), **SIZES, **self.theirs}
        settings = {key: value for key, value in settings.items() if value is not None}
        config = getattr(transformers, f"{self.family}Config")(**settings)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def config(self) -> Any:
        """Our config, checked."""
        config = default_config.get_config()
        config.model.update(OURS | self.ours)
        if self.attention is not None:
            options = WINDOW | self.attention
            config.attention = registry.method_config("attention", "masformer", **options)
        config.data.seq_len = 32
        config_lib.validate(config, num_devices=1)
        return config


GEMMA3 = Case(
    "Gemma3Text",
    {
        "num_hidden_layers": 7,
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        "sliding_window": 7,
        "query_pre_attn_scalar": 12,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "sliding_attention": rope() | {"rope_theta": 50.0},
            "full_attention": rope("linear", factor=8.0),
        },
    },
    {
        "num_layers": 7,
        "tie_embeddings": True,
        "embedding_scale": 24**0.5,
        "norm_unit_offset": True,
        "post_norm": True,
        "qk_norm": True,
        "mlp": "geglu_tanh",
        "attention_scale": 12**-0.5,
        "logits_soft_cap": 3.0,
        "rope_scaling": "linear",
        "rope_factor": 8.0,
        "rope_local_layers": (0, 1, 2, 3, 4, 6),
        "rope_local_theta": 50.0,
    },
    {"full_layers": (5,)},
    hugging_face.GEMMA3,
)
GPT_NEO = Case(
    "GPTNeo",
    {
        **dict.fromkeys([*SIZES, "rope_parameters"]),
        "vocab_size": 53,
        "hidden_size": 24,
        "num_layers": 4,
        "num_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "window_size": 7,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attention_types": [[["global", "local"], 2]],
        "attn_implementation": "eager",
    },
    {
        "num_layers": 4,
        "num_heads": 3,
        "num_kv_heads": 3,
        "tie_embeddings": True,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "position": "learned",
        "max_positions": 64,
        "mlp": "gelu_tanh",
        "mlp_bias": True,
        "out_bias": True,
        "attention_scale": 1.0,
    },
    {"full_layers": (0, 2)},
    hugging_face.GPT_NEO,
)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"beta_fast": 2.0, "beta_slow": 1.0, "original_max_position_embeddings": 64}
CASES = {
    "llama": Case("Llama"),
    "llama_tied_with_biases": Case(
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"tie_embeddings": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "linear": Case(
        "Llama",
        {"rope_parameters": rope("linear", factor=4.0)},
        {"rope_scaling": "linear", "rope_factor": 4.0},
    ),
    "llama3": Case(
        "Llama",
        {"rope_parameters": rope("llama3", factor=8.0, **LLAMA3)},
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_positions": 64},
    ),
    "yarn": Case(
        "Llama",
        {"rope_parameters": rope("yarn", factor=4.0, **YARN), "max_position_embeddings": 256},
        {
            "rope_scaling": "yarn",
            "rope_factor": 4.0,
            "rope_original_positions": 64,
            "rope_beta_fast": 2.0,
        },
    ),
    "mistral": Case("Mistral", {"sliding_window": 7}, {}, {"num_full_layers": 0}),
    "qwen2": Case(
        "Qwen2",
        {"head_dim": None, "hidden_size": 32, "tie_word_embeddings": True},
        {"embed_dim": 32, "qkv_bias": True, "tie_embeddings": True},
    ),
    "qwen3": Case("Qwen3", {}, {"qk_norm": True}),
    "gemma3": GEMMA3,
    "gpt_neo": GPT_NEO,
}


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    import torch
    import transformers

    case = CASES[name]
    theirs = case.model(transformers)
    tokens = torch.randint(53, (2, 31))
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
    model_def = ModelDef(case.config())
    weights = {key: value.numpy() for key, value in theirs.state_dict().items()}
    params = hugging_face.parameters(model_def, weights, case.table)

    @jax.jit
    def logits(params, tokens):
        return model_def.model(params, {}, 0)(tokens).logits

    assert_close(logits(params, jnp.asarray(tokens.numpy(), jnp.int32)), expected, 1e-5)
