"""Schedules against their definitions, and which parameters get what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef


def rates(config, num_steps):
    schedule = make_schedule(config.optimizer, num_steps)
    return np.array([schedule(step) for step in range(num_steps + 1)])


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules(config, name, warmup):
    config.optimizer.schedule = name
    config.optimizer.warmup_steps = warmup
    config.optimizer.decay_steps = 4
    config.optimizer.final_fraction = 0.25
    peak, num_steps = config.optimizer.learning_rate, 12
    step = np.arange(num_steps + 1)
    after = {
        "constant": np.ones(num_steps + 1),
        "cosine": 0.25 + 0.75 * (1 + np.cos(np.pi * (step - warmup) / (num_steps - warmup))) / 2,
        "wsd": 1 - 0.75 * np.clip((step - 8) / 4, 0, 1),
    }[name]
    expected = peak * np.where(step < warmup, (step + 1 + 0 * step) / (warmup + 1), after)
    np.testing.assert_allclose(rates(config, num_steps), expected, rtol=1e-5)


@pytest.fixture
def variables(config):
    return ModelDef(config).params


def decayed(config, variables):
    """The parameters an update without gradient moves: those with weight decay."""
    config.optimizer.warmup_steps = 0
    optimizer = make_optimizer(config.optimizer, 10, variables)
    params = {name: jnp.ones(v.shape) for name, v in variables.items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    return {name for name, update in updates.items() if np.any(update)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_acts_on_projections_only(config, variables, name):
    config.optimizer.name = name
    names = decayed(config, variables)
    assert names == {n for n in variables if n.endswith("/kernel")}
    assert {n for n in variables if "norm" in n or "embedding" in n}.isdisjoint(names)


def test_muon_orthogonalises_every_layer_by_itself(config, variables):
    """Newton-Schulz brings the singular values of an update near 0.2 sqrt(max(in, out)) each."""
    config.optimizer.name = "muon"
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    optimizer = make_optimizer(config.optimizer, 10, variables)
    keys = jax.random.split(jax.random.key(0), len(variables))
    grads = {
        name: jax.random.normal(key, v.shape)
        * 10.0 ** jnp.arange(v.shape[0]).reshape(-1, *[1] * (v.ndim - 1))
        if name.startswith("stacks")
        else jax.random.normal(key, v.shape)
        for key, (name, v) in zip(keys, variables.items(), strict=True)
    }
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    name = "stacks/0/unit/0/attention/query/kernel"
    per_layer = np.asarray(updates[name]).reshape(2, 32, 32) / config.optimizer.learning_rate
    for update in per_layer:
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(32))
        assert 0.3 < np.median(singular) < 1.3
        assert singular.max() < 1.5
    table = "embedding/table"
    adam = optax.adamw(config.optimizer.learning_rate, b1=0.9, b2=0.95, weight_decay=0.0)
    expected, _ = adam.update(grads[table], adam.init(params[table]), params[table])
    np.testing.assert_allclose(updates[table], expected, rtol=1e-5)


def newton_schulz(x):
    """Five steps of Jordan et al. 2024, written out for one matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_muon_orthogonalises_the_nesterov_momentum(config, variables):
    """Over three unlike gradients, with bias corrections as optax has them, and decay."""
    config.optimizer.update(name="muon", schedule="constant", warmup_steps=0)
    config.optimizer.update(momentum=0.8, weight_decay=0.5)
    beta, rate = config.optimizer.momentum, config.optimizer.learning_rate
    optimizer = make_optimizer(config.optimizer, 10, variables)
    params = {name: jnp.full(v.shape, 0.25) for name, v in variables.items()}
    name = "stacks/0/unit/0/mlp/up/kernel"
    draws = np.random.default_rng(0).standard_normal((3, *params[name].shape))
    state, mean = optimizer.init(params), np.zeros(params[name].shape)
    for count, grad in enumerate(draws, 1):
        grads = {n: jnp.asarray(grad, jnp.float32) if n == name else x for n, x in params.items()}
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        mean = beta * mean + (1 - beta) * grad
        ahead = beta * mean / (1 - beta ** (count + 1)) + (1 - beta) * grad / (1 - beta**count)
        size = 0.2 * np.sqrt(max(grad.shape[-2:]))
        expected = [-rate * (size * newton_schulz(layer) + 0.5 * 0.25) for layer in ahead]
        np.testing.assert_allclose(updates[name], expected, atol=1e-4 * rate * size)
