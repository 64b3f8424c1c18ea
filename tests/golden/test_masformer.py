"""MASFormer against GPT-Neo of transformers, whose layers got the paper's masks.

Everything comes from the files: other shapes, seeds, masks and variants pass unchanged.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import default_config, registry
from sparseformer_jax.attention import masformer
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.loss import cross_entropy
from sparseformer_jax.training.state import ModelDef
from tests.golden import loading
from tests.model import hugging_face
from tests.model.harness import (
    assert_close,
    attention_weights,
    layers,
    normal,
)

SETTINGS = loading.settings("masformer")
MASKS = loading.arrays("masformer", "masks.npz")
MODEL = loading.arrays("masformer", "tiny_model.npz")
WEIGHTS = {k.removeprefix("w/"): v for k, v in MODEL.items() if k.startswith("w/")}
SPANS = {
    "window": "window",
    "block": "block",
    "block_prev": "block_and_previous",
    None: "block",
}
# Relative to the largest entry; logits are not scaled down, so softmax is steep.
TOLERANCES = {
    "loss": 1e-6,
    "logits": 2e-5,
    "hidden_batch0": 2e-5,
    "attn_probs_batch0": 5e-5,
    "grad_wte": 1e-4,
    "grad_q_proj": 1e-4,
}
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}


@pytest.mark.parametrize("case", SETTINGS["masks"], ids=lambda case: case["key"])
@pytest.mark.representative("K00_mask", "K03_mask", "K05_mask")
def test_mask(case):
    options = masformer.Options(SPANS[case["kind"]], case["size"])
    config = ModelConfig(3, 1, 4, 1, 1, 8, 4)
    attention = masformer.Method(config, options, rngs=nnx.Rngs(0))
    query, key = (normal(seed, 1, case["seqlen"], 1, 8) for seed in range(2))
    visible = np.asarray(attention_weights(attention, query, key))[0, 0] > 0
    np.testing.assert_array_equal(visible, MASKS[case["key"]].astype(bool))
    assert visible.sum() == case["allowed_pairs"]


def model_config():
    sizes = SETTINGS["config"]

    def has(name):
        return any(name in weight for weight in WEIGHTS)

    return ModelConfig(
        vocab_size=sizes["vocab"],
        num_layers=sizes["layers"],
        embed_dim=sizes["hidden"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        mlp_dim=sizes["mlp_hidden"],
        position="learned",
        max_positions=sizes["max_positions"],
        norm="layernorm",
        norm_eps=sizes["layer_norm_eps"],
        mlp=ACTIVATIONS[sizes["activation"]],
        qkv_bias=has("q_proj.bias"),
        out_bias=has("out_proj.bias"),
        mlp_bias=has("c_fc.bias"),
        tie_embeddings=sizes["tied_embeddings"],
        attention_scale=sizes["attention_scale"],
    )


def make_model(variant):
    config = default_config.get_config()
    config.model.update(dataclasses.asdict(model_config()))
    config.attention = registry.method_config(
        "attention",
        "masformer",
        span=SPANS[variant["sparse_kind"]],
        span_size=variant["sparse_size"] or 1,
        full_layers=tuple(variant["full_attention_layers"]),
    )
    model_def = ModelDef(config)
    weights = hugging_face.parameters(model_def, WEIGHTS, hugging_face.GPT_NEO)
    return model_def.model(jax.tree.map(jnp.asarray, weights), {}, 0)


def loss(model, tokens):
    hidden = model.features(tokens).hidden
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    nll, _ = cross_entropy(model, hidden, targets, weights)
    return nll / weights.sum(), model.logits(hidden, model.output_kernel())


def look_inside(model, tokens):
    """The residual stream and the attention weights of every layer."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.embedding(tokens) + model.position_embedding(positions)
    hidden, weights = [], []
    for block in layers(model):
        hidden.append(x)
        y = block.attention_norm(x)
        query, key = block.attention.query(y), block.attention.key(y)
        weights.append(attention_weights(block.attention, query, key))
        x, _ = block(x, positions, None, None)
    return jnp.stack([*hidden, model.final_norm(x)]), jnp.stack(weights)


@pytest.mark.parametrize("variant", SETTINGS["variants"], ids=lambda variant: variant["name"])
@pytest.mark.representative("bottom1_window8")
def test_model(variant):
    model, tokens = make_model(variant), jnp.asarray(MODEL["input_ids"])
    graphdef, state = nnx.split(model)
    hidden, weights = jax.jit(lambda s, x: look_inside(nnx.merge(graphdef, s), x))(
        state, tokens[:1]
    )
    (value, logits), gradients = jax.jit(
        jax.value_and_grad(lambda s, x: loss(nnx.merge(graphdef, s), x), has_aux=True)
    )(state, tokens)
    gradients = nnx.merge(graphdef, gradients)
    width = model.config.embed_dim
    query = [block.attention.query.kernel[...] for block in layers(gradients)]
    actual = {
        "logits": logits,
        "loss": value,
        "attn_probs_batch0": weights[:, 0],
        "hidden_batch0": hidden[:, 0],
        "grad_wte": gradients.embedding.table[...],
        "grad_q_proj": jnp.stack(query).reshape(len(query), width, width).swapaxes(1, 2),
    }
    expected = {name: MODEL[f"{variant['name']}/{name}"] for name in TOLERANCES}
    assert value == pytest.approx(variant["loss"], rel=1e-6)
    for name, tolerance in TOLERANCES.items():
        assert_close(actual[name], expected[name], tolerance)
