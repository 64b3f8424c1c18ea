"""The loss is optax's, in float64, with weights, z-loss and a divided vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseformer_jax import mesh
from sparseformer_jax.model.loss import cross_entropy
from tests.model.harness import assert_close, in_float64, normal, put

B, T, V = 4, 7, 24


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, T), np.int32)
    weights = rng.uniform(0, 2, (B, T)).astype(np.float32) * rng.integers(0, 2, (B, T))
    return 5 * normal(0, B, T, V), targets, weights.astype(np.float32)


def expected(logits, targets, weights):
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    log_z = nll + jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (weights * nll).sum(), (weights * log_z**2).sum()


def test_sums_are_those_of_optax(problem):
    actual = cross_entropy(*map(jnp.asarray, problem))
    assert_close(actual, in_float64(expected, *problem), 1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradient_is_that_of_optax(problem, z_loss):
    def total(sums):
        return lambda *arguments: sums(*arguments)[0] + z_loss * sums(*arguments)[1]

    actual = jax.grad(total(cross_entropy))(*map(jnp.asarray, problem))
    assert_close(actual, in_float64(jax.grad(total(expected)), *problem), 1e-6)


def test_large_logits_do_not_overflow():
    logits = jnp.asarray([[[1e4, -1e4, 0.0], [1e15, 0.0, -1e15]]])
    nll, log_z2 = cross_entropy(logits, jnp.asarray([[1, 0]]), jnp.asarray([[1.0, 1.0]]))
    assert nll == pytest.approx(2e4)
    nll, log_z2 = cross_entropy(logits, jnp.asarray([[1, 0]]), jnp.asarray([[1.0, 0.0]]))
    assert log_z2 == pytest.approx(1e8)


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_vocabulary_may_be_divided(problem, sizes):
    def loss(*arguments):
        return cross_entropy(*arguments)[0]

    local = jax.value_and_grad(loss)(*map(jnp.asarray, problem))
    logits, targets, weights = problem
    with jax.set_mesh(mesh.make_mesh(sizes)):
        divided = put(logits, "batch", "seq", "vocab")
        rows = put(targets, "batch", "seq"), put(weights, "batch", "seq")
        actual = jax.jit(jax.value_and_grad(loss))(divided, *rows)
        assert actual[1].sharding.spec == divided.sharding.spec
    assert_close(actual, local, 1e-6)
