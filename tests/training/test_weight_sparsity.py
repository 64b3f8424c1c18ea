"""Runs with sparse weights, stopped and resumed: the same floats as in one piece."""

import jax
import numpy as np
import pytest

from sparseformer_jax import mesh, registry
from sparseformer_jax.training import loop
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.restore import restore_train_state
from sparseformer_jax.training.state import ModelDef, abstract_state
from tests.training import processes

# Stopped after two steps: in the decay that became hard masks, and amid what noise and logits do.
OPTIONS = {
    "pgf": {"recipe": "sdgf_stepwise", "targets": ("all=1:4",), "dense_steps": 1, "decay_steps": 2},
    "maskllm": {"targets": ("ff=2:4",), "schedule_steps": 4},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OPTIONS)
def test_a_stopped_run_resumes_with_equal_floats(config, tmp_path, on_call, name):
    """With dropout, accumulation and sparse attention."""
    config.sparsity = registry.method_config("sparsity", name, **OPTIONS[name])
    config.train.num_steps, config.checkpoint.every = 4, 100
    config.eval.num_batches = 1
    config.mesh.update(data=2, fsdp=2, tensor=2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.train(config, whole)
    on_call(loop.TrainBatches, "__next__", call=2)
    loop.train(config, stopped)
    assert list(processes.losses(stopped)) == [1, 2]
    loop.train(config, stopped)
    assert processes.losses(stopped) == processes.losses(whole)
    jax.tree.map(np.testing.assert_array_equal, last(config, stopped), last(config, whole))


def last(config, workdir):
    model_def = ModelDef(config)
    params = {name: model_def.params[name] for name in model_def.trainable()}
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, params)
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])), Checkpoints(workdir) as checkpoints:
        abstract = abstract_state(model_def, optimizer, jax.sharding.get_mesh())
        return jax.device_get(restore_train_state(model_def, checkpoints, 4, abstract))
