"""Every layer computes its formula, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import mesh
from sparseformer_jax.model import layers
from tests.model import reference
from tests.model.harness import (
    assert_close,
    in_float64,
    normal,
    place,
    pure,
    put,
    randomized,
    small_config,
)

MESH = {"data": 2, "tensor": 2, "context": 2}


def test_projection_contracts_the_last_dimensions():
    config = small_config()
    x = normal(0, 3, 5, 4, 6)
    axes = ("heads", "head_dim", "embed")
    projection = randomized(
        lambda: layers.Projection((4, 6), (7,), axes, config, use_bias=True, rngs=nnx.Rngs(0))
    )
    expected = x.reshape(15, 24) @ projection.kernel[...].reshape(24, 7)
    expected = expected.reshape(3, 5, 7) + projection.bias[...]
    assert_close(projection(jnp.asarray(x)), expected, 1e-6)
    assert projection.kernel.in_dims == 2
    assert projection.bias.axes == ("embed",)


@pytest.mark.parametrize("in_dims", [1, 2])
def test_gradients_of_a_projection(in_dims):
    x, kernel = normal(0, 3, 5, 4, 6), normal(1, 4, 6, 7, 2)
    if in_dims == 1:
        x, kernel = x.reshape(3, 5, 24), kernel.reshape(24, 7, 2)

    def gradients(project):
        return jax.grad(lambda *both: jnp.sin(project(*both, in_dims)).sum(), (0, 1))

    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    with jax.enable_x64(True):
        expected = gradients(jnp.tensordot)(x, kernel)
    for one, other in zip(gradients(layers.project)(*arrays), expected, strict=True):
        assert_close(one, other, 1e-5)
    # XLA's CPU backend copies a factor of a product that is to be transposed.
    assert "transpose[" not in str(jax.make_jaxpr(gradients(layers.project))(*arrays))


@pytest.mark.parametrize("init_scale", [1.0, 0.25])
def test_projection_keeps_variance(init_scale):
    kernel = layers.Projection(
        (64, 2),
        (128,),
        ("heads", "head_dim", "embed"),
        small_config(),
        use_bias=False,
        init_scale=init_scale,
        rngs=nnx.Rngs(0),
    ).kernel
    assert kernel[...].std() == pytest.approx(init_scale / 128**0.5, rel=0.02)
    assert abs(kernel[...].mean()) < 0.002


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm(kind, offset):
    config = small_config(norm_eps=0.1, norm_unit_offset=offset)
    norm = randomized(lambda: layers.Norm(20, kind, config))
    x = 3 + 0.5 * normal(0, 2, 5, 20)
    expected = in_float64(lambda p, x: reference.norm(p, x, kind, 0.1, offset), pure(norm), x)
    assert_close(norm(jnp.asarray(x)), expected, 1e-6)
    assert (norm.bias is not None) == (kind == "layernorm")


def test_norm_starts_at_a_factor_of_one():
    x = jnp.asarray(normal(0, 2, 20))
    plain, offset = (
        layers.Norm(20, "rmsnorm", small_config(norm_unit_offset=has)) for has in (False, True)
    )
    np.testing.assert_array_equal(plain(x), offset(x))
    assert not offset.scale[...].any()


def test_norm_computes_in_float32():
    norm = layers.Norm(16, "layernorm", small_config(compute_dtype="bfloat16"))
    x = jnp.asarray(1000 + normal(0, 4, 16), jnp.float32)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), 0.01)


@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh", "gelu", "gelu_tanh"])
def test_mlp(kind):
    config = small_config(mlp=kind, mlp_bias=True)
    mlp = randomized(lambda: layers.Mlp(config, rngs=nnx.Rngs(0)))
    x = normal(0, 2, 5, 20)
    expected = in_float64(lambda p, x: reference.mlp(p, x, kind), pure(mlp), x)
    assert_close(mlp(jnp.asarray(x)), expected, 2e-6)


def test_embedding_looks_up():
    config = small_config()
    embedding = layers.Embedding(37, ("vocab", "embed"), config, rngs=nnx.Rngs(0))
    table = embedding.table[...]
    tokens = jnp.asarray([[3, 36], [0, 3]])
    np.testing.assert_array_equal(embedding(tokens), np.asarray(table)[tokens])


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_dropout(rate):
    x = jnp.asarray(normal(0, 100, 200))
    kept = layers.dropout(x, rate, jax.random.key(0))
    zeroed = np.asarray(kept) == 0
    assert zeroed.mean() == pytest.approx(rate, abs=0.01)
    assert_close(kept[~zeroed], (x / (1 - rate))[~zeroed], 1e-6)
    assert layers.dropout(x, rate, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(0)) is x


def test_soft_cap():
    logits = jnp.asarray([-1e6, -1.0, 0.0, 0.5, 1e6])
    assert_close(layers.soft_cap(logits, 2.0), 2 * np.tanh(np.asarray(logits) / 2), 1e-6)
    assert layers.soft_cap(logits, None) is logits


def test_layers_on_a_mesh_are_those_of_one_device():
    config = small_config(vocab_size=36, mlp_bias=True)
    embedding = layers.Embedding(36, ("vocab", "embed"), config, rngs=nnx.Rngs(0))
    mlp = randomized(lambda: layers.Mlp(config, rngs=nnx.Rngs(1)))
    tokens = np.random.default_rng(0).integers(0, 36, (4, 6), np.int32)

    @jax.jit
    def run(embedding, mlp, tokens):
        return layers.dropout(mlp(embedding(tokens)), 0.5, jax.random.key(0))

    expected = run(embedding, mlp, tokens)
    with jax.set_mesh(mesh.make_mesh(MESH)):
        x = run(place(embedding), place(mlp), put(tokens, "batch", "seq"))
        assert x.sharding.spec == mesh.spec("batch", "seq", None)
    assert_close(x, expected, 1e-5)


def test_gradients_of_a_layer_on_a_mesh_are_those_of_one_device():
    mlp = randomized(lambda: layers.Mlp(small_config(mlp_bias=True), rngs=nnx.Rngs(1)))
    x = normal(0, 4, 6, small_config().embed_dim).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda mlp, x: jnp.sum(jnp.sin(mlp(x))), (0, 1)))
    expected = gradients(mlp, jnp.asarray(x))
    with jax.set_mesh(mesh.make_mesh(MESH)):
        found = gradients(place(mlp), put(x, "batch", "seq", None))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, 1e-5)
