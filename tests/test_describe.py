"""The costs of a config against counting by hand."""

import jax
import numpy as np
import pytest

from sparseformer_jax import describe, mesh, presets, registry
from sparseformer_jax.training.state import ModelDef


@pytest.fixture
def config():
    config = presets.baseline("tiny")
    config.train.batch_size = jax.device_count()
    return config


def test_dense_costs(config):
    """2 D 258 + L (D (N + 2 K) H + N H D + 3 D F + 2 D) + D parameters, tied embedding once."""
    model = config.model
    model.tie_embeddings = False
    with jax.set_mesh(mesh.make_mesh({"data": 8})):
        cost = describe.costs(config, ModelDef(config))
    embed, head = model.embed_dim, model.head_dim
    projections = embed * head * (2 * model.num_heads + 2 * model.num_kv_heads)
    layer = projections + 3 * embed * model.mlp_dim
    matrices = model.num_layers * layer + embed * model.vocab_size
    norms = (2 * model.num_layers + 1) * embed
    assert cost.parameters == matrices + embed * model.vocab_size + norms
    assert cost.trainable == cost.parameters
    assert cost.densities == (1.0, 1.0)
    keys = np.mean(np.arange(1, config.data.seq_len + 1))
    attention = model.num_layers * 4 * model.num_heads * head * keys
    np.testing.assert_allclose(cost.forward_flops, 2 * matrices + attention)


def test_sparse_layers_cost_less(config):
    config.model.num_layers = 5
    config.attention = registry.method_config(
        "attention", "masformer", span_size=32, full_layers=(1, 4)
    )
    with jax.set_mesh(mesh.make_mesh({"data": 8})):
        cost = describe.costs(config, ModelDef(config))
    block = 4 * (32 * 33 / 2) / (128 * 129 / 2)
    np.testing.assert_allclose(cost.densities, [block, 1, block, block, 1])


def test_describe_shows_everything(config):
    config.attention = registry.method_config("attention", "s2", block_size=16)
    config.train.trainable = "attention"
    text = describe.describe(config)
    assert "attention.block_size = 16" in text
    assert "layer 1: " in text
    assert "mesh data:8,fsdp:1,tensor:1,context:1" in text
    parameters, trainable = (
        int(word.replace(",", ""))
        for word in text.split("parameters: ")[1].split(" trainable")[0].split(" (")
    )
    assert 0 < trainable < parameters
    model = config.model
    places = 64 + 16 * model.num_heads // model.num_kv_heads  # the band, and stripes of a group
    kept = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 4 * places
    assert f"{kept / config.data.seq_len:,.0f} bytes a token" in text
