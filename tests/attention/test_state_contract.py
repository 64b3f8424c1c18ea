"""What every method keeps to whose variables follow statistics of the tokens, new ones too.

A method is tested at the "tiny" size of its config. What its variables become depends on the
batch alone: on no mesh, number of pieces or recomputation. Checkpoints hold them bit for bit.
"""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh, registry
from sparseformer_jax.attention.base import Attention
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.restore import restore_state, saved_form
from sparseformer_jax.training.state import ModelDef, TrainState
from tests.model.harness import assert_close
from tests.training.steps import packed_batch, train

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def has_state(name):
    method = registry.method("attention", name).Method
    return method.update.__func__ is not Attention.update.__func__


@pytest.fixture(scope="module", params=filter(has_state, registry.names("attention")))
def method(request):
    return request.param


@pytest.fixture
def config(method):
    config = runpy.run_path(str(CONFIGS / f"{method}.py"))["get_config"]("tiny")
    config.train.accumulation_steps = 1
    config.optimizer.warmup_steps = 0
    config.optimizer.eps = 1e-4  # or AdamW divides rounding by rounding
    return config


def run(config, sizes, batch):
    """Losses, what sums over tokens in the last of three steps, and the variables."""
    losses, metrics, state = train(config, sizes, batch)
    named = {name: metrics[name] for name in ("total_loss", "variable_norm")}
    return losses, named, state.variables


@pytest.fixture(scope="module")
def batch():
    return packed_batch(250, rows=8, seq_len=64)


@pytest.fixture(scope="module")
def expected():
    """The result on one device at once, made by the first test that asks for it."""
    return {}


@pytest.mark.parametrize("change", ["pieces", "mesh"])
@pytest.mark.representative("*-mesh")
def test_state_depends_on_the_batch_alone(config, batch, expected, method, change):
    if method not in expected:
        expected[method] = run(config, {}, batch)
    sizes = {"data": 2, "tensor": 2, "context": 2} if change == "mesh" else {}
    if change == "pieces":
        config.train.accumulation_steps = 4
        config.model.remat = "full"
    assert_close(run(config, sizes, batch), expected[method], 1e-4)


def test_state_moves_and_padding_does_not_move_it(config, batch):
    """Other tokens in rows 3 and 4, which have no weight, change nothing."""
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        _, before = jax.device_get(ModelDef(config).init(jax.random.key(0)))
    other = {name: x.copy() for name, x in batch.items()}
    other["inputs"][3:5] = 7
    states = [train(config, {}, tokens, num_steps=1)[2] for tokens in (batch, other)]
    for name, value in states[0].variables.items():
        assert np.abs(value - before[name]).max() > 0, name
        np.testing.assert_allclose(value, states[1].variables[name], rtol=1e-6, err_msg=name)


def test_a_checkpoint_holds_it_for_every_mesh(config, tmp_path):
    """Saved by eight devices, read by one and by eight that cut other axes."""
    model_def = ModelDef(config)
    random = np.random.default_rng(0)

    def placed(x):
        return jax.device_put(random.random(x.shape, np.float32), x.sharding)

    with jax.set_mesh(mesh.make_mesh({"fsdp": 4, "tensor": 2})):
        abstract = model_def.abstract(jax.sharding.get_mesh())
        params, variables = jax.tree.map(placed, abstract)
        with Checkpoints(tmp_path) as saved:
            state = TrainState(7, params, variables)
            saved.save(7, saved_form(model_def, state), Meta({}, "", "{}"))
        expected = jax.device_get(variables)
    for sizes in ({}, {"data": 2, "tensor": 2, "context": 2}):
        devices = jax.devices()[: 8 if sizes else 1]
        with jax.set_mesh(mesh.make_mesh(sizes, devices)):
            restored = restore_state(model_def, tmp_path).variables
        for name, value in restored.items():
            assert len(value.sharding.device_set) == len(devices)
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        assert set(restored) == set(expected)


def test_evaluation_makes_no_statistics(config, batch):
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)

        def statistics(key):
            model = model_def.model(*model_def.init(jax.random.key(0)), 0)
            return model.features(jnp.asarray(batch["inputs"]), rng=key).statistics

        assert jax.eval_shape(statistics, None) == {}
        assert jax.eval_shape(statistics, jax.random.key(0))
