"""Layers that differ, in settings or in attention, are of kinds; what is equal scans together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import default_config, mesh, registry
from sparseformer_jax.attention import dense, masformer
from sparseformer_jax.model.block import layer_kinds
from sparseformer_jax.model.stack import group_layers
from sparseformer_jax.model.transformer import Transformer
from sparseformer_jax.training.state import ModelDef
from tests.model.harness import (
    SMALL,
    assert_close,
    layers,
    normal,
    place,
    put,
    randomized,
    small_config,
)

WINDOW = masformer.Options(span="window", span_size=4, full_layers=(2, 5))
# Two windows of their own rotary base to one full layer.
GEMMA = {
    "num_layers": 7,
    "head_dim": 8,
    "rope_local_layers": (0, 1, 3, 4, 6),
    "rope_local_theta": 50.0,
    "rope_scaling": "linear",
    "rope_factor": 4.0,
    "partial_rotary_factor": 0.75,
    "norm_unit_offset": True,
    "post_norm": True,
    "qk_norm": True,
    "mlp": "geglu_tanh",
    "embedding_scale": 20**0.5,
    # What the mesh of the tests divides.
    "vocab_size": 36,
}


def make(**changes):
    """A window and a full layer, twice."""
    config = small_config(**GEMMA | {"num_layers": 4, "rope_local_layers": (0, 2)} | changes)
    options = dataclasses.replace(WINDOW, full_layers=(1, 3))
    model = randomized(lambda: Transformer(config, masformer.Method, options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    around_zero = [
        (path, leaf - 1 if path[-1] == "scale" else leaf)
        for path, leaf in nnx.to_flat_state(nnx.as_pure(state))
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(around_zero))


def sizes(config, method=dense.Method, options=None):
    """The number of blocks of each unit, and how often it repeats."""
    kinds = layer_kinds(config, method, options or dense.Options())
    return [(len(unit), repeats) for unit, repeats in group_layers(kinds)]


def test_rotary_bases_and_windows_are_one_kind():
    config = small_config(**GEMMA)
    # By the bases alone, by the windows alone, and by both.
    plain = small_config(num_layers=7)
    assert sizes(config) == sizes(plain, masformer.Method, WINDOW) == [(3, 2), (1, 1)]
    assert sizes(config, masformer.Method, WINDOW) == [(3, 2), (1, 1)]
    kinds = layer_kinds(config, masformer.Method, WINDOW)
    assert [kind.config.rope_theta for kind in kinds[:3]] == [50, 50, 10_000]
    assert [kind.config.rope_scaling for kind in kinds[:3]] == ["none", "none", "linear"]
    methods = [masformer.Method, masformer.Method, dense.Method]
    assert [kind.attention for kind in kinds[:3]] == methods


def test_patterns_that_do_not_fit_split_the_layers():
    config = small_config(num_layers=4, rope_local_layers=(0, 1), rope_local_theta=50.0)
    assert sizes(config) == [(1, 2), (1, 2)]
    alternating = masformer.Options(span_size=4, full_layers=(0, 2))
    assert sizes(config, masformer.Method, alternating) == [(1, 1)] * 4


def test_a_local_base_equal_to_the_others_is_no_kind_of_its_own():
    config = small_config(rope_local_layers=(1,), rope_local_theta=10_000.0)
    assert sizes(config) == [(1, 3)]


@pytest.fixture(scope="module")
def model():
    return make()


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 36, (2, 12), np.int32))


@jax.jit
def loss_and_gradients(model, tokens):
    directions = normal(1, *tokens.shape, 36)
    return jax.value_and_grad(lambda model: jnp.vdot(directions, model(tokens).logits))(model)


def test_scanned_kinds_are_the_layers_one_after_another(model):
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

    @jax.jit
    def by_hand(model):
        x = model.embed(TOKENS, positions)
        for block in layers(model):
            x, _ = block(x, positions, None, None)
        return model.final_norm(x)

    scanned = jax.jit(lambda model: model.features(TOKENS).hidden)(model)
    assert_close(scanned, by_hand(model), 1e-5)


@pytest.mark.exhaustive
def test_gradients_recomputed_on_a_mesh_are_those_of_one_device(model):
    expected = loss_and_gradients(model, TOKENS)
    with jax.set_mesh(mesh.make_mesh({"data": 2, "tensor": 2, "context": 2})):
        found = loss_and_gradients(place(make(remat="full")), put(TOKENS, "batch", "seq"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Parameters that are half an ulp away move them by 8e-6.
        assert_close(one, other, 3e-5)


def test_names_of_layers_do_not_tell_their_kinds():
    """So parameters go from a model whose layers are alike to one of several kinds."""
    config = default_config.get_config()
    config.model.update(SMALL | GEMMA)
    config.attention = registry.method_config(
        "attention", "masformer", span="window", span_size=4, full_layers=(2, 5)
    )
    alike = default_config.get_config()
    alike.model.update(SMALL | GEMMA | {"rope_local_layers": ()})
    alike.model.rope_local_theta = None
    old, new = ModelDef(alike), ModelDef(config)
    assert (len(old.params), len(new.params)) == (2 + 13, 2 + 13 * 4)
    params, _ = old.init(jax.random.key(0))
    by_layer = old.to_layers(params)
    assert "layers/5/attention_post_norm/scale" in by_layer
    there_and_back = new.to_layers(new.from_layers(by_layer))
    assert there_and_back.keys() == by_layer.keys()
    jax.tree.map(np.testing.assert_array_equal, there_and_back, by_layer)


def test_the_scale_of_embeddings_is_rounded_as_they_are():
    config = small_config(embedding_scale=20**0.5, compute_dtype="bfloat16")
    model = Transformer(config, dense.Method, dense.Options(), rngs=nnx.Rngs(0))
    tokens = jnp.arange(6)[None]
    table = model.embedding.table[...].astype(jnp.bfloat16)
    expected = table[tokens] * jnp.bfloat16(20**0.5)
    np.testing.assert_array_equal(model.embed(tokens, tokens), expected)
