"""The loss is optax's over all logits at once, however it is cut into chunks and over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseformer_jax import mesh
from sparseformer_jax.model import loss
from sparseformer_jax.model.layers import soft_cap
from tests.model.harness import assert_close, in_float64, normal, put

B, T, D, V = 4, 14, 6, 24
# Logits at once -> tokens in a chunk on one device: a power of two, which need not divide B T.
CHUNKS = {10**6: B * T, 16 * V: 16, 8 * V - 1: 4, 1: 1}
MESHES = [{"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "fsdp": 4}]


@dataclasses.dataclass
class Head:
    """The output head of a model: a matrix, and a cap on its logits."""

    kernel: jax.Array

    def output_kernel(self):
        return self.kernel

    def logits(self, hidden, kernel):
        return soft_cap(hidden @ kernel, 20.0)


@pytest.fixture
def problem():
    """Hidden states, kernel, targets and uneven weights, some of them 0."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, T), np.int32)
    weights = rng.uniform(0, 2, (B, T)) * rng.integers(0, 2, (B, T))
    return 3 * normal(0, B, T, D), normal(1, D, V), targets, weights.astype(np.float32)


def ours(hidden, kernel, targets, weights):
    """Both sums, and the gradients of their mixture."""

    def mixture(hidden, kernel):
        sums = loss.cross_entropy(Head(kernel), hidden, targets, weights)
        return sums[0] + 0.1 * sums[1], sums

    gradients, sums = jax.grad(mixture, (0, 1), has_aux=True)(hidden, kernel)
    return sums, gradients


def expected(hidden, kernel, targets, weights):
    def mixture(hidden, kernel):
        logits = 20 * jnp.tanh(hidden @ kernel / 20)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        log_z = nll + jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        sums = (weights * nll).sum(), (weights * log_z**2).sum()
        return sums[0] + 0.1 * sums[1], sums

    gradients, sums = jax.grad(mixture, (0, 1), has_aux=True)(hidden, kernel)
    return sums, gradients


@pytest.mark.parametrize("at_once", CHUNKS)
def test_sums_and_gradients_are_those_of_optax(problem, monkeypatch, at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    truth = in_float64(expected, *problem)
    assert_close(in_float64(ours, *problem), truth, 1e-13)
    assert_close(jax.jit(ours)(*map(jnp.asarray, problem)), truth, 1e-6)


def test_losses_of_tokens_are_what_their_weights_multiply(problem, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * V)
    hidden, kernel, targets, weights = map(jnp.asarray, problem)

    def weighed(weights):
        return loss.cross_entropy(Head(kernel), hidden, targets, weights)[0]

    expected = jax.grad(weighed)(weights)
    assert_close(loss.token_losses(Head(kernel), hidden, targets), expected, 1e-6)
    with jax.set_mesh(mesh.make_mesh(MESHES[-1])):
        placed = put(hidden, "batch", "seq", None), put(targets, "batch", "seq")
        found = loss.token_losses(Head(put(kernel, None, "vocab")), *placed)
    assert found.sharding.spec == placed[1].sharding.spec
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("sizes", [{}, MESHES[0], MESHES[-1]], ids=str)
def test_scores_of_tokens_say_which_are_likeliest(problem, monkeypatch, sizes):
    """Of two equal logits the first, also where the vocabulary is divided between them."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * V)
    hidden, kernel, targets, _ = problem
    hidden[0, 0] = hidden[0, 1] = 5 * kernel[:, 3]
    kernel[:, 20] = kernel[:, 3]
    likeliest = np.argmax(hidden @ kernel, axis=-1)
    targets[0, :2], targets[1] = [3, 20], likeliest[1]

    def scores(hidden, kernel, targets):
        return loss.token_scores(Head(kernel), hidden, targets)

    with jax.set_mesh(mesh.make_mesh(sizes, jax.devices() if sizes else jax.devices()[:1])):
        placed = put(hidden, "batch", "seq", None), put(kernel, None, "vocab")
        nll, is_likeliest = jax.jit(scores)(*placed, put(targets, "batch", "seq"))
    hidden, kernel, ids = map(jnp.asarray, (hidden, kernel, targets))
    expected = loss.token_losses(Head(kernel), hidden, ids)
    assert_close(nll, expected, 1e-6)
    np.testing.assert_array_equal(is_likeliest, targets == likeliest)
    assert np.asarray(is_likeliest)[0, :2].tolist() == [True, False]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_tokens_and_vocabulary_may_be_divided(problem, monkeypatch, sizes):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * V)
    truth = in_float64(expected, *problem)
    hidden, kernel, targets, weights = problem
    with jax.set_mesh(mesh.make_mesh(sizes)):
        placed = put(hidden, "batch", "seq", None), put(kernel, None, "vocab")
        rows = put(targets, "batch", "seq"), put(weights, "batch", "seq")
        actual = jax.jit(ours)(*placed, *rows)
        assert [x.sharding.spec for x in actual[1]] == [x.sharding.spec for x in placed]
    assert_close(actual, truth, 1e-6)


def test_large_logits_do_not_overflow():
    @dataclasses.dataclass
    class Uncapped(Head):
        def logits(self, hidden, kernel):
            return hidden @ kernel

    hidden = jnp.asarray([[[1e4, -1e4, 0.0], [1e15, 0.0, -1e15]]])
    sums = functools.partial(loss.cross_entropy, Uncapped(jnp.eye(3)), hidden)
    nll, _ = sums(jnp.asarray([[1, 0]]), jnp.asarray([[1.0, 1.0]]))
    assert nll == pytest.approx(2e4)
    _, log_z2 = sums(jnp.asarray([[1, 0]]), jnp.asarray([[1.0, 0.0]]))
    assert log_z2 == pytest.approx(1e8)


def test_bfloat16_gradients_add_up_in_float32(monkeypatch):
    """Over 256 chunks bfloat16 would stop adding: a chunk is 1/256 of the sum."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", V)
    hidden = jnp.broadcast_to(jnp.asarray(normal(0, D), jnp.bfloat16), (1, 512, D))
    kernel = jnp.asarray(normal(1, D, V), jnp.bfloat16)
    targets, weights = jnp.zeros((1, 512), jnp.int32), jnp.ones((1, 512))

    def gradient(count):
        def nll(kernel):
            rows = (x[:, :count] for x in (hidden, targets, weights))
            return loss.cross_entropy(Head(kernel), *rows)[0]

        return jax.jit(jax.grad(nll))(kernel).astype(jnp.float32)

    assert_close(gradient(512), 512 * gradient(1), 2**-8)
