"""Runs in processes of their own: killed and started again, split over two; on other meshes.

Routing has what resuming can lose: centroids, which follow the tokens of every step before.
"""

import signal
import socket

import jax
import numpy as np
import pytest

from sparseformer_jax import mesh, registry
from sparseformer_jax.training import loop
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.restore import restore_train_state
from sparseformer_jax.training.state import ModelDef, abstract_state
from tests.model.harness import assert_close
from tests.training import processes

OPTIONS = {
    "s2": {"block_size": 8, "local_blocks": 1, "vert_stride": 2},
    "routing": {"num_clusters": 4, "window_size": 8, "block_size": 8, "decay": 0.9},
    "combiner": {"span_size": 8},
    "seer": {"gates": "decode", "block_size": 8, "token_budget": 16, "joint": True},
}


@pytest.fixture(params=OPTIONS)
def endless(config, request):
    """A run that only a signal ends, so that no signal can come too late."""
    config.train.num_steps = 10**6
    config.model.num_kv_heads = config.model.num_heads
    config.attention = registry.method_config("attention", request.param, **OPTIONS[request.param])
    config.checkpoint.keep_last = 100
    config.optimizer.eps = 1e-4  # or AdamW divides rounding by rounding on other meshes
    return config


@pytest.mark.representative("routing")
def test_a_killed_run_resumes_with_equal_floats(endless, tmp_path):
    """Packing, shuffling, dropout and accumulation are on."""
    workdir = tmp_path / "interrupted"
    run = processes.start(endless, workdir)
    # The save at step 4 waited for that at step 2 to be whole.
    processes.interrupt(run, 5, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    run = processes.start(endless, workdir)
    output = processes.interrupt(run, 7, signal.SIGINT)
    assert run.returncode == 130, output
    assert "resuming from step" in output
    assert "the same command resumes" in output
    actual = processes.losses(workdir)
    assert list(actual) == list(range(1, len(actual) + 1))
    whole = tmp_path / "whole"
    assert actual == _uninterrupted(endless, whole, len(actual))
    step = max(_saved(workdir) & _saved(whole))
    assert step > 5
    for expected, found in zip(*(_state(endless, run, step) for run in (whole, workdir)), strict=1):
        np.testing.assert_array_equal(expected, found)


@pytest.mark.exhaustive
def test_two_processes_equal_one_and_resume_there_on_other_axes(endless, tmp_path, on_call, capsys):
    """Each reads its own rows; the shuffled, packed stream of the run is one and the same."""
    endless.mesh.update(data=4, fsdp=2)
    workdir = tmp_path / "two"
    pair = _start_pair(endless, workdir)
    processes.interrupt(pair[0], 3, signal.SIGTERM)
    pair[1].communicate(timeout=processes.TIMEOUT)
    assert [process.returncode for process in pair] == [0, 0]
    on_two = max(processes.losses(workdir))

    endless.mesh.update(data=1, fsdp=2, tensor=2, context=2)
    on_call(loop.TrainBatches, "__next__", call=3)
    loop.train(endless, workdir)
    assert f"resuming from step {on_two}" in capsys.readouterr().out
    last = on_two + 3
    assert list(processes.losses(workdir)) == list(range(1, last + 1))
    on_call(loop.TrainBatches, "__next__", call=last)
    loop.train(endless, tmp_path / "whole")
    _assert_near(endless, workdir, tmp_path / "whole", last)


@pytest.mark.exhaustive
def test_eight_devices_are_resumed_on_one(endless, tmp_path, on_call):
    endless.mesh.update(data=1, fsdp=2, tensor=2, context=2)
    workdir, whole = tmp_path / "eight", tmp_path / "whole"
    on_call(loop.TrainBatches, "__next__", call=3)
    loop.train(endless, workdir)
    endless.mesh.update(fsdp=1, tensor=1, context=1)
    for folder in (workdir, whole):
        processes.interrupt(processes.start(endless, folder), 6, signal.SIGTERM)
    _assert_near(endless, workdir, whole, 6)


def _uninterrupted(config, workdir, num_steps):
    """Returns the losses of the first steps of a run in one piece."""
    run = processes.start(config, workdir)
    processes.interrupt(run, num_steps, signal.SIGTERM)
    assert run.returncode == 0
    losses = processes.losses(workdir)
    return {step: losses[step] for step in range(1, num_steps + 1)}


def _saved(workdir):
    """The steps that are saved."""
    return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


def _state(config, workdir, step):
    """What a run saved at a step: parameters, variables and the optimiser's state, in order."""
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])), Checkpoints(workdir) as checkpoints:
        model_def = ModelDef(config)
        optimizer = make_optimizer(config.optimizer, config.train.num_steps, model_def.params)
        abstract = abstract_state(model_def, optimizer, jax.sharding.get_mesh())
        state = restore_train_state(model_def, checkpoints, step, abstract)
    assert bool(state.variables) == (config.attention.name == "routing")
    return jax.tree.leaves(jax.device_get(state))


def _assert_near(config, workdir, expected, step):
    """Both runs have the same losses and, at a step, the same state to rounding."""
    losses, wanted = (list(processes.losses(run).values())[:step] for run in (workdir, expected))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_close(_state(config, workdir, step), _state(config, expected, step), 1e-4)


def _start_pair(config, workdir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    # The first alone writes compiled programs, and the second might read half of one.
    env = ({}, {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    return [
        processes.start(config, workdir, *cluster, f"--process_id={i}", num_devices=4, **env[i])
        for i in range(2)
    ]
