"""Runs in processes of their own: killed and started again, split over two; resumed on one."""

import signal
import socket

import numpy as np
import pytest

from sparseformer_jax.training import loop
from tests.training import processes


@pytest.fixture
def endless(config):
    """A run that only a signal ends, so that no signal can come too late."""
    config.train.num_steps = 10**6
    return config


def test_a_killed_run_resumes_with_equal_floats(endless, tmp_path):
    """Packing, shuffling, dropout and accumulation are on."""
    workdir = tmp_path / "interrupted"
    run = processes.start(endless, workdir)
    # The save at step 4 waited for that at step 2 to be whole.
    processes.interrupt(run, 5, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    for step, number, code in ((7, signal.SIGTERM, 0), (9, signal.SIGINT, 130)):
        run = processes.start(endless, workdir)
        output = processes.interrupt(run, step, number)
        assert run.returncode == code, output
        assert "resuming from step" in output
        assert "the same command resumes" in output
    actual = processes.losses(workdir)
    assert list(actual) == list(range(1, len(actual) + 1))
    assert actual == _uninterrupted(endless, tmp_path, len(actual))


def test_two_processes_equal_one_and_resume_on_it(endless, tmp_path, on_call, capsys):
    """Each reads its own rows; the shuffled, packed stream of the run is one and the same."""
    endless.mesh.data = 4
    endless.mesh.fsdp = 2
    workdir = tmp_path / "two"
    pair = _start_pair(endless, workdir)
    processes.interrupt(pair[0], 3, signal.SIGTERM)
    pair[1].communicate(timeout=processes.TIMEOUT)
    assert [process.returncode for process in pair] == [0, 0]
    on_two = max(processes.losses(workdir))

    on_call(loop.TrainBatches, "__next__", call=3)
    loop.train(endless, workdir)
    assert f"resuming from step {on_two}" in capsys.readouterr().out
    actual = processes.losses(workdir)
    assert list(actual) == list(range(1, on_two + 4))
    on_call(loop.TrainBatches, "__next__", call=len(actual))
    loop.train(endless, tmp_path / "whole")
    expected = processes.losses(tmp_path / "whole")
    assert list(actual) == list(expected)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-5)


def _uninterrupted(config, tmp_path, num_steps):
    """Returns the losses of the first steps of a run in one piece."""
    run = processes.start(config, tmp_path / "whole")
    processes.interrupt(run, num_steps, signal.SIGTERM)
    assert run.returncode == 0
    losses = processes.losses(tmp_path / "whole")
    return {step: losses[step] for step in range(1, num_steps + 1)}


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
