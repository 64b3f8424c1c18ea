"""Runs in processes of their own: killed and started again, split over two, resumed on one."""

import signal
import socket

import numpy as np

from tests.training import processes


def test_a_killed_run_resumes_with_equal_floats(config, tmp_path):
    """Packing, shuffling, dropout and accumulation are on."""
    processes.finish(processes.start(config, tmp_path / "whole"))
    expected = processes.losses(tmp_path / "whole")
    assert list(expected) == [1, 2, 3, 4, 5, 6]

    workdir = tmp_path / "interrupted"
    run = processes.start(config, workdir)
    processes.interrupt(run, 3, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL

    run = processes.start(config, workdir)
    output = processes.interrupt(run, 4, signal.SIGTERM)
    assert run.returncode == 0, output
    assert "the same command resumes" in output

    output = processes.finish(processes.start(config, workdir))
    assert "resuming from step" in output
    assert processes.losses(workdir) == expected


def test_two_processes_equal_one_and_resume_on_it(config, tmp_path):
    """Each reads its own rows; the shuffled, packed stream of the run is one and the same."""
    config.mesh.data = 4
    config.mesh.fsdp = 2
    one = processes.start(config, tmp_path / "one", num_devices=8)
    processes.finish(one)
    expected = processes.losses(tmp_path / "one")

    workdir = tmp_path / "two"
    pair = _start_pair(config, workdir)
    processes.interrupt(pair[0], 3, signal.SIGTERM)
    pair[1].communicate(timeout=processes.TIMEOUT)
    assert [process.returncode for process in pair] == [0, 0]
    assert 3 <= max(processes.losses(workdir)) < 6

    output = processes.finish(processes.start(config, workdir, num_devices=8))
    assert "resuming from step" in output
    actual = processes.losses(workdir)
    assert list(actual) == list(expected)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-5)


def _start_pair(config, workdir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    return [
        processes.start(config, workdir, *cluster, f"--process_id={i}", num_devices=4)
        for i in range(2)
    ]
