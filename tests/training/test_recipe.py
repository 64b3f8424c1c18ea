"""Training steps against the recipe written out in NumPy: losses, AdamW, accumulation, dtypes.

Batches and weights are uneven, every term and rate counts: a factor anywhere shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseformer_jax import mesh, registry
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, TrainState
from sparseformer_jax.training.step import make_train_step
from tests.model.harness import PENALISED, put

RATE, DECAY, B1, B2, EPS, CLIP, Z_LOSS = 0.01, 0.5, 0.7, 0.95, 1e-4, 0.5, 0.1
STEPS, PIECES, ROWS, LENGTH, VOCAB = 3, 2, 4, 16, 40


@pytest.fixture
def recipe(config, add_attention):
    """A config in which everything that enters a step is on, and nothing is random."""
    add_attention("penalised", PENALISED)
    config.attention = registry.method_config("attention", "penalised")
    config.model.update(vocab_size=VOCAB, dropout=0.0)
    config.data.seq_len = LENGTH
    config.train.update(accumulation_steps=PIECES, batch_size=PIECES * ROWS, z_loss=Z_LOSS)
    config.optimizer.update(
        learning_rate=RATE,
        schedule="constant",
        warmup_steps=0,
        weight_decay=DECAY,
        b1=B1,
        b2=B2,
        eps=EPS,
        clip_norm=CLIP,
    )
    return config


def draw(seed):
    """A batch whose first piece has ten times the weight of the second."""
    rng = np.random.default_rng(seed)
    shape = (PIECES, ROWS, LENGTH)
    weights = rng.uniform(0.5, 2, shape) * np.array([1.0, 0.1])[:, None, None]
    return {
        "inputs": rng.integers(0, VOCAB, shape, np.int32),
        "targets": rng.integers(0, VOCAB // 4, shape, np.int32),
        "weights": weights.astype(np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
    }


def train(config, batches):
    """The state before training and after every batch, and the metrics of each."""
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        optimizer = make_optimizer(config.optimizer, STEPS, model_def.params)
        schedule = make_schedule(config.optimizer, STEPS)
        step = jax.jit(make_train_step(model_def, optimizer, schedule))
        params = model_def.init(jax.random.key(1))[0]
        states = [TrainState(jnp.int32(0), params, {}, optimizer.init(params))]
        measured = []
        for batch in batches:
            placed = {name: put(x, None, "batch", "seq") for name, x in batch.items()}
            state, metrics = step(states[-1], placed)
            states.append(state)
            measured.append(metrics)
        return jax.device_get((states, measured))


def objective_of(config):
    """The function that returns a piece's gradient and its terms, from logits all at once."""
    model_def = ModelDef(config)

    def objective(params, piece, total):
        inputs = (piece[name] for name in ("inputs", "positions", "segment_ids", "weights"))
        output = model_def.model(params, {}, 0)(*inputs)
        logits, weights = output.logits, piece["weights"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, piece["targets"])
        log_z2 = jnp.log(jnp.sum(jnp.exp(logits), -1)) ** 2
        share = jnp.sum(weights) / total
        terms = {
            "loss": jnp.sum(weights * nll) / total,
            "energy": output.losses["energy"] / total,
            "density": share * jnp.mean(output.diagnostics["density"]),
        }
        z_loss = Z_LOSS * jnp.sum(weights * log_z2) / total
        terms["total_loss"] = terms["loss"] + z_loss + terms["energy"]
        return terms["total_loss"], terms

    return jax.jit(jax.grad(objective, has_aux=True))


def summed(objective, params, batch):
    """Gradient and terms of a batch, the pieces added in float64."""
    total = batch["weights"].sum()
    pieces = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["weights"]))]
    parts = jax.device_get([objective(params, piece, total) for piece in pieces])
    return jax.tree.map(lambda *xs: sum(np.float64(x) for x in xs), *parts)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in tree.values()))


def adamw(params, grads, mean, square, count):
    """Loshchilov & Hutter 2019, algorithm 2, with decay on projection kernels alone."""
    factor = min(1.0, CLIP / norm(grads))
    new, moments = {}, ({}, {})
    for name, value in params.items():
        grad = factor * grads[name]
        m = B1 * mean.get(name, 0) + (1 - B1) * grad
        v = B2 * square.get(name, 0) + (1 - B2) * grad**2
        step = m / (1 - B1**count) / (np.sqrt(v / (1 - B2**count)) + EPS)
        decay = DECAY * value if name.endswith("/kernel") else 0
        new[name] = value - RATE * (step + decay)
        moments[0][name], moments[1][name] = m, v
    return new, *moments


def test_steps_are_the_recipe_by_hand(recipe):
    batches = [draw(seed) for seed in range(STEPS)]
    states, measured = train(recipe, batches)
    objective = objective_of(recipe)
    params, moments = jax.tree.map(np.float64, states[0].params), ({}, {})
    for count, (batch, metrics) in enumerate(zip(batches, measured, strict=True), 1):
        grads, terms = summed(objective, jax.tree.map(np.float32, params), batch)
        assert norm(grads) > CLIP
        params, *moments = adamw(params, grads, *moments, count)
        for name, value in terms.items():
            np.testing.assert_allclose(metrics[name], value, 1e-4, err_msg=name)
        np.testing.assert_allclose(metrics["grad_norm"], norm(grads), 1e-4)
        np.testing.assert_allclose(metrics["tokens"], batch["weights"].sum(), 1e-6)
        for name, value in params.items():
            actual = states[count].params[name]
            np.testing.assert_allclose(actual, value, rtol=0, atol=0.01 * RATE, err_msg=name)


def test_bfloat16_parameters_have_float32_arithmetic(recipe):
    """Fifteen pieces of a thousandth of the weight are lost to a sum in bfloat16."""
    recipe.model.param_dtype = "bfloat16"
    recipe.train.accumulation_steps = 16
    first = draw(0)
    batch = {name: np.concatenate([x[:1]] + [x[1:]] * 15) for name, x in first.items()}
    batch["weights"][1:] = np.mean(batch["weights"][0]) / 1000
    states, (metrics,) = train(recipe, [batch])
    before, after = (jax.tree.map(np.float32, state.params) for state in states)
    grads, _ = summed(objective_of(recipe), states[0].params, batch)
    head, _ = summed(objective_of(recipe), states[0].params, {n: x[:1] for n, x in batch.items()})
    assert abs(norm(head) / norm(grads) - 1) > 1e-3  # the light pieces show in the norm
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads), 2e-4)
    assert {x.dtype for x in jax.tree.leaves(states[1].params)} == {jnp.dtype("bfloat16")}
    assert jax.tree.map(jnp.shape, states[1].opt_state) == jax.tree.map(
        jnp.shape, states[0].opt_state
    )
    dtypes = [[x.dtype for x in jax.tree.leaves(state.opt_state)] for state in states]
    assert dtypes[0] == dtypes[1]
    expected, *_ = adamw(jax.tree.map(np.float64, before), grads, {}, {}, 1)
    for name, value in expected.items():
        rounded = value.astype(jnp.bfloat16).astype(np.float32)
        equal = np.mean(after[name] == rounded)
        assert equal > 0.9, f"{name}: {equal} are the rounded result"
