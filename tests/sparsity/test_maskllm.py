"""Learned masks: the noise, the prior's lean, refusals, and a language model that gains by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh, presets, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import validate
from sparseformer_jax.sparsity import maskllm, nm
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.training import weight_sparsity
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.state import ModelDef, new_state
from tests.training.steps import train

TARGET = Target(Pattern(2, 4), -2, 2)


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("prior", ["magnitude", "none", "given"])
def test_logits_lean_to_the_prior(prior):
    """By alpha standard deviations: it is the first hard mask; without one it is any."""
    weight, given = random(16, 40), nm.mask(random(16, 40), 2, 4, -2)
    method = maskllm.Method(maskllm.Options(prior="magnitude" if prior == "given" else prior))
    state = method.init(weight, TARGET, jax.random.key(0), given if prior == "given" else None)
    kept = method.kept(weight, state, TARGET)
    assert nm.holds(np.asarray(kept), Pattern(2, 4), -2)
    wanted = given if prior == "given" else nm.mask(jnp.abs(weight), 2, 4, -2)
    agree = np.asarray(kept == wanted).reshape(4, 4, 40).all(axis=1).mean()
    assert agree < 0.4 if prior == "none" else agree > 0.85
    assert state["mask_logits"].dtype == jnp.float32


def test_noise_is_gumbels():
    """Mean and variance, as of 10^5 draws, and never infinite."""
    noise = np.asarray(maskllm.gumbel(jax.random.key(0), jnp.zeros(10**5)))
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=5 * 1.28 / 10**2.5)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.05)


def test_schedules_end_and_stay():
    options = maskllm.Options(schedule_steps=10)
    kappa, tau = jax.vmap(lambda step: maskllm.schedule(options, step))(jnp.array([0, 5, 10, 99]))
    np.testing.assert_allclose(kappa, [100, 300, 500, 500], rtol=1e-6)
    np.testing.assert_allclose(tau, [4, 2.025, 0.05, 0.05], rtol=1e-5)


def test_the_regulariser_moves_logits_only():
    method = maskllm.Method(maskllm.Options(regularizer_fades=False))
    logits = random(6, 2, 5)

    def losses(weight, logits):
        applied = method.apply(weight, {"mask_logits": logits}, TARGET, 7, jax.random.key(0))
        return sum(applied.losses.values())

    of_weight, of_logits = jax.jit(jax.grad(losses, (0, 1)))(random(8, 5), logits)
    assert not of_weight.any()
    assert of_logits.any()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("kappa", (100.0,), "kappa=(100.0,): must be two positive numbers, start and end"),
        ("tau", (4.0, 0.0), "tau=(4.0, 0.0): must be two positive numbers"),
        ("schedule_steps", 0, "schedule_steps=0: must be at least 1"),
        ("init_std", 0.0, "init_std=0.0: must be positive"),
        ("regularizer", -1.0, "regularizer=-1.0: must be at least 0"),
    ],
)
def test_mistakes(option, value, message):
    config = presets.baseline("tiny")
    config.sparsity = registry.method_config("sparsity", "maskllm")
    with config.ignore_type():
        config.sparsity[option] = value
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert str(error.value).startswith(f"sparsity.{message}")


def model_config():
    config = presets.baseline("tiny")
    config.model.embed_dim = 32
    config.model.head_dim = 8
    config.model.mlp_dim = 48
    config.model.vocab_size = 32
    config.train.accumulation_steps = 1
    config.optimizer.warmup_steps = 0
    config.optimizer.learning_rate = 0.02
    config.optimizer.schedule = "constant"
    return config


def language(rows, seed):
    """Tokens of which each follows from the one before, to one of four at random."""
    follows = np.random.default_rng(0).integers(0, 32, (32, 4))
    draw, tokens = np.random.default_rng(seed), np.zeros((rows, 33), np.int32)
    for place in range(1, 33):
        tokens[:, place] = follows[tokens[:, place - 1], draw.integers(0, 4, rows)]
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(32, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, 32), np.int32),
        "weights": np.ones((rows, 32), np.float32),
    }


def test_a_learned_mask_beats_the_magnitudes_that_it_starts_from():
    """Of weights that were trained dense and then frozen, on text that neither has seen."""
    dense = model_config()
    _, _, trained = train(dense, {}, language(32, seed=1), num_steps=40)
    config = model_config()
    config.sparsity = registry.method_config(
        "sparsity", "maskllm", targets=("mlp/(up|down)=2:4",), schedule_steps=20
    )
    config.train.trainable = "/mask_logits$"
    held_out = jax.tree.map(jnp.asarray, language(32, seed=2))
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        logits = {name: model_def.params[name] for name in model_def.trainable()}
        optimizer = make_optimizer(config.optimizer, 10, logits)
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in logits.items()}

        @jax.jit
        def start(params):
            key = jax.random.key(0)
            made = weight_sparsity.start(model_def, params, {}, key, {})
            return new_state(model_def, optimizer, *made)

        @jax.jit
        def loss(state):
            model = model_def.model(state.params, state.variables, state.step)
            logits = model(held_out["inputs"]).logits
            chosen = jax.nn.one_hot(held_out["targets"], 32)
            return -jnp.sum(chosen * jax.nn.log_softmax(logits)) / held_out["targets"].size

        first = start(trained.params | zeros)
        before = float(loss(first))
    _, _, last = train(config, {}, language(32, seed=1), num_steps=20, state=first)
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        after = float(loss(last))
    assert after < before - 0.1
    for name, x in trained.params.items():
        np.testing.assert_array_equal(last.params[name], x)
