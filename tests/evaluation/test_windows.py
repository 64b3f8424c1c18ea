"""Perplexity in windows against a computation by hand, for any batch size and mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh, presets
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation import windows
from sparseformer_jax.evaluation.windows import Windows
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.state import ModelDef

TEXT = "the quick brown fox, żółć! " * 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a random model, its config, and the model."""
    workdir = tmp_path_factory.mktemp("run")
    config = presets.baseline("tiny")
    config.data.seq_len = 32
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        params, variables = model_def.init(jax.random.key(0))
        state = {"step": jnp.zeros((), jnp.int32), "params": model_def.to_layers(params)}
        meta = Meta({}, "", config_lib.to_json(config))
        with Checkpoints(workdir, keep_last=1) as checkpoints:
            checkpoints.write(3, state | {"variables": variables}, meta)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    (workdir / "text.txt").write_text(TEXT)
    model = model_def.model(jax.tree.map(jnp.asarray, jax.device_get(params)), variables, 0)
    return workdir, config, model


def by_hand(model, pieces, start=(), seen=None):
    """Loss of all but the first token of each piece, or the first `seen`, one after another."""
    nll, count = 0.0, 0
    compute = jax.jit(lambda tokens: model(tokens).logits)
    for piece, known in zip(pieces, seen or [1] * len(pieces), strict=True):
        tokens = np.array([*start, *piece])
        logits = np.asarray(compute(tokens[None])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for position in range(len(start) + known - 1, len(tokens) - 1):
            nll -= log_p[position, tokens[position + 1]]
            count += 1
    return nll / count, count


def evaluate(run, size, number=0, bos="none", stride=0, **eval_config):
    workdir, config, _ = run
    config = config_lib.from_json(config_lib.to_json(config))
    config.eval.update(eval_config)
    return windows.evaluate(
        config, workdir, [workdir / "text.txt"], Windows(size, number, bos, stride)
    )


@pytest.mark.parametrize("bos", ["none", "window", "text"])
def test_windows_of_a_text(run, bos):
    """The last is shorter, and the last batch is not full."""
    ids = list(TEXT.encode())
    stream = [256, *ids] if bos == "text" else ids
    pieces = [stream[start : start + 24] for start in range(0, len(stream), 24)]
    expected, count = by_hand(run[2], pieces, [256] if bos == "window" else [])
    found = evaluate(run, 24, bos=bos)
    assert (found["tokens"], found["windows"], found["step"]) == (count, len(pieces), 3)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], np.exp(expected), rtol=1e-5)


def test_the_first_windows(run):
    ids = list(TEXT.encode())
    found = evaluate(run, 24, number=2, batch_size=8)
    expected, count = by_hand(run[2], [ids[:24], ids[24:48]])
    assert found["tokens"] == count == 46
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_overlapping_windows_predict_every_token_once(run):
    bos, stride = "window", 10
    ids = list(TEXT.encode())
    pieces, seen = [ids[:24]], [1]
    for start in range(stride, len(ids), stride):
        if len(ids) > start + 24 - stride:  # else the window before has it all
            pieces.append(ids[start : start + 24])
            seen.append(24 - stride)
    expected, count = by_hand(run[2], pieces, [256], seen)
    found = evaluate(run, 24, bos=bos, stride=stride)
    assert found["tokens"] == count == len(ids) - 1
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    # Of a byte-level model a token is a byte.
    np.testing.assert_allclose(found["bits_per_byte"], expected / np.log(2), rtol=1e-5)


def test_command(run, capsys):
    workdir, _, _ = run
    arguments = [f"--workdir={workdir}", f"--files={workdir / 'text.txt'}", "--window=24"]
    windows.main(["windows", *arguments])
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["loss"], evaluate(run, 24)["loss"])
    with pytest.raises(SystemExit) as stopped:
        windows.main(["windows", f"--workdir={workdir}", "--files=absent.txt"])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: --files=absent.txt: cannot be read: No such file or directory\n"
    )


def test_mistakes(run, tmp_path):
    workdir, config, _ = run
    with pytest.raises(ConfigError, match="--window=1: predicts nothing"):
        Windows(1)
    with pytest.raises(ConfigError, match="--stride=25: leaves out tokens .*--window=24"):
        Windows(24, stride=25)
    with pytest.raises(ConfigError, match="--bos='windw': not one of .*did you mean window"):
        Windows(24, 0, "windw")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"a\.txt: too short"):
        windows.evaluate(config, workdir, [tmp_path / "a.txt"], Windows(24))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"b\.txt: cannot be read: it is no UTF-8"):
        windows.evaluate(config, workdir, [tmp_path / "b.txt"], Windows(24))
    other = config_lib.from_json(config_lib.to_json(config))
    other.data.bos_token = ""
    with pytest.raises(ConfigError, match="names no token; set --config.data.bos_token"):
        windows.evaluate(other, workdir, [workdir / "text.txt"], Windows(24, 0, "text"))
