"""Two writers of one workdir: the second is told who is first, and nobody else is kept out."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training import lock, loop
from tests.training.processes import ROOT

HOLD = """
import pathlib, sys, time
from sparseformer_jax.training import lock
with lock.exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_run_is_told_who_holds_the_workdir(config, tmp_path):
    holder = f"process {os.getpid()} on {socket.gethostname()}, since 20"
    with lock.exclusive(tmp_path):
        with pytest.raises(ConfigError, match=holder) as error:
            loop.train(config, tmp_path)
        assert "\n" not in str(error.value)
    with lock.exclusive(tmp_path):
        pass


def test_a_killed_holder_holds_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        taken = lock.exclusive(tmp_path)
        with pytest.raises(ConfigError, match=f"process {process.pid} on .* trains there"):
            taken.__enter__()
        process.send_signal(signal.SIGKILL)
    with lock.exclusive(tmp_path):
        pass


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with lock.exclusive(tmp_path):
        (tmp_path / lock.FILE).write_text("{")
        with pytest.raises(ConfigError, match="another process trains there"):
            lock.exclusive(tmp_path).__enter__()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.exclusive(tmp_path):
        (line,) = capsys.readouterr().err.splitlines()
    assert "has no locks (No locks available); let no other run write there" in line
