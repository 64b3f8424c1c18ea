"""The trainer's benchmark: PyTorch's row trains the same model as ours."""

import importlib
import itertools
import pathlib

import jax
import numpy as np
import pytest

from sparseformer_jax import mesh, presets
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, init_state
from sparseformer_jax.training.step import make_train_step

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def twin(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("torch_twin")


@pytest.mark.oracle
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_twin_trains_as_our_dense_model_does(twin, qk_norm):
    torch = importlib.import_module("torch")
    config = presets.baseline("tiny")  # two query heads share a key
    config.model.qk_norm = qk_norm
    config.train.batch_size, config.data.seq_len = 4, 48
    model_def = ModelDef(config)
    optimizer = make_optimizer(config.optimizer, 4, model_def.params)
    schedule = make_schedule(config.optimizer, 4)
    model = twin.Twin(config.model)
    tokens = np.random.default_rng(0).integers(0, 258, (4, 49), np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(48, dtype=np.int32), (4, 48)),
        "segment_ids": np.ones((4, 48), np.int32),
        "weights": np.ones((4, 48), np.float32),
    }
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        state = init_state(model_def, optimizer, jax.random.key(0))
        model.load(model_def.to_layers(state.params))
        step = jax.jit(make_train_step(model_def, optimizer, schedule))
        sharding = mesh.spec(None, "batch", "seq")
        pieces = {name: jax.device_put(x[None], sharding) for name, x in batch.items()}
        ours = []
        for _ in range(4):
            state, metrics = step(state, pieces)
            ours.append((metrics["loss"], metrics["grad_norm"]))
    theirs = twin.Step(model, config.optimizer, map(float, map(schedule, itertools.count())))
    arrays = [torch.tensor(batch[name], dtype=torch.int64) for name in ("inputs", "targets")]
    # Adam's first steps are of size 1 whatever the gradient: what is rounding in it moves a
    # parameter as far as the rate, and the norm of later gradients with it.
    np.testing.assert_allclose(ours, [theirs(*arrays) for _ in range(4)], rtol=2e-5)
