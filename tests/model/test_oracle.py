"""The model computes what transformers' Llama, Qwen 2, Qwen 3 and GPT-Neo compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax.attention import masformer
from sparseformer_jax.model.transformer import Transformer
from tests.model import hugging_face
from tests.model.harness import assert_close, small_config

pytestmark = pytest.mark.oracle

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_implementation": "eager",
}
OURS = {
    "vocab_size": 53,
    "embed_dim": 24,
    "mlp_dim": 40,
    "head_dim": 8,
    "norm_eps": 1e-4,
    "rope_theta": 500.0,
}


def llama(transformers, **changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))


def qwen2(transformers):
    sizes = SIZES | {"hidden_size": 32, "tie_word_embeddings": True}
    del sizes["head_dim"]
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))


def qwen3(transformers):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def gpt_neo(transformers):
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=53,
            hidden_size=24,
            num_layers=3,
            num_heads=3,
            intermediate_size=40,
            max_position_embeddings=64,
            window_size=7,
            bos_token_id=None,
            eos_token_id=None,
            attention_types=[[["local", "global", "local"], 1]],
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (llama, {"tie_embeddings": False}),
        (qwen2, {"embed_dim": 32, "qkv_bias": True}),
        (qwen3, {"tie_embeddings": False, "qk_norm": True}),
        (
            gpt_neo,
            {
                "num_heads": 3,
                "num_kv_heads": 3,
                "norm": "layernorm",
                "norm_eps": 1e-5,
                "position": "learned",
                "max_positions": 64,
                "mlp": "gelu_tanh",
                "mlp_bias": True,
                "out_bias": True,
                "attention_scale": 1.0,
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_logits(make, changes):
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = make(transformers).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = torch.randint(53, (2, 31))
        expected = theirs(tokens).logits.numpy()
    weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
    # GPT-Neo's alternate layers are a window; the others have none.
    full = (1,) if make is gpt_neo else (0, 1, 2)
    options = masformer.Options(span="window", span_size=7, full_layers=full)
    config = small_config(**OURS | changes)
    model = Transformer(config, masformer.Method, options, rngs=nnx.Rngs(0))
    model = hugging_face.load(model, weights)
    actual = jax.jit(lambda model, tokens: model(tokens).logits)(
        model, jnp.asarray(tokens.numpy().astype(np.int32))
    )
    assert_close(actual, expected, 1e-5)
