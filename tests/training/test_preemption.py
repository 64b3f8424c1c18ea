"""A run that is asked to end: at once where nothing is lost, after a save where it would be."""

import json
import signal
import subprocess
import sys

import pytest

from sparseformer_jax import data
from sparseformer_jax.training import loop
from sparseformer_jax.training.checkpoint import Checkpoints
from tests.training.processes import ROOT


@pytest.fixture
def config(config):
    """Without what makes compiling slow: steps are counted here, not compared."""
    config.train.accumulation_steps, config.model.dropout = 1, 0.0
    return config


def steps(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if name in line]


def saved(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.latest_step


def test_preparing_data_ends_at_once(config, tmp_path, on_call, capsys):
    calls = on_call(data, "load_corpus")
    loop.train(config, tmp_path)
    assert len(calls) == 1
    assert "asked to terminate: no step was done, nothing to save" in capsys.readouterr().out
    assert saved(tmp_path) is None


def test_compiling_ends_at_once(config, tmp_path, on_call, capsys):
    """Before the step that would have to be saved is run, not after it."""
    calls = on_call(loop.Run, "_compile")
    loop.train(config, tmp_path)
    assert len(calls) == 1
    assert "no step was done, nothing to save" in capsys.readouterr().out
    assert saved(tmp_path) is None


@pytest.mark.exhaustive
def test_a_step_is_saved_without_evaluating_first(config, tmp_path, on_call, capsys):
    config.eval.every, config.checkpoint.every = 1, 0
    on_call(loop.TrainBatches, "__next__", call=2)
    loop.train(config, tmp_path)
    assert f"stopped at step 2, which is saved in {tmp_path}" in capsys.readouterr().out
    assert saved(tmp_path) == 2
    assert steps(tmp_path, "eval/loss") == [1]

    # What was left out is made up for, and nothing is evaluated twice.
    on_call(loop.TrainBatches, "__next__", call=2)
    loop.train(config, tmp_path)
    assert steps(tmp_path, "eval/loss") == [1, 2, 3]
    assert steps(tmp_path, "train/loss") == [1, 2, 3, 4]


def test_an_evaluation_is_given_up_for_a_save(config, tmp_path, on_call):
    config.eval.every, config.checkpoint.every = 1, 0
    on_call(loop.Evaluator, "measure", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="interrupted: stopped at step 1, which is saved"):
        loop.train(config, tmp_path)
    assert saved(tmp_path) == 1
    assert steps(tmp_path, "eval/loss") == []


SECOND = """
import hashlib, os, signal, threading
from sparseformer_jax.training.preemption import Preemption
with Preemption():
    os.kill(os.getpid(), signal.SIGINT)
    print("asked", flush=True)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    # Minutes in C, without the lock of the interpreter: as a compilation.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)
"""


def test_a_second_ctrl_c_ends_at_once():
    process = subprocess.run(
        [sys.executable, "-c", SECOND], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "asked\n", "")
