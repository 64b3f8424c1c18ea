"""The loop in this process: what it writes, refuses and survives."""

import json

import jax
import numpy as np
import pytest

from sparseformer_jax import cli, describe, mesh
from sparseformer_jax.checks import ConfigError, NonFiniteError
from sparseformer_jax.evaluation.perplexity import evaluate_checkpoint
from sparseformer_jax.generation.sampling import generate
from sparseformer_jax.training import loop
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.state import ModelDef


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_numbers_are_written_step_by_step(run, finished):
    lines = read(finished)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/perplexity" in line] == [2, 4]
    train = lines[0]
    np.testing.assert_allclose(train["train/loss"], np.log(264), rtol=0.05)
    assert 0 < train["train/density"] < 1
    assert train["train/tokens"] < 16 * 32  # targets in other documents do not count
    speed = [line for line in lines if "train/tokens_per_second" in line][-1]
    step_seconds = speed["train/tokens"] / speed["train/tokens_per_second"]
    with jax.set_mesh(mesh.make_mesh({"data": 8})):
        flops = describe.costs(run, ModelDef(run)).training_flops * 16 * 32
    np.testing.assert_allclose(speed["train/flops_per_second"] * step_seconds, flops)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = finished.glob("events.out.tfevents*")
    for name in ("density", "kept", "loss_by_position", "weights"):
        assert events.read_bytes().count(f"pictures/{name}".encode()) == 2, "one an evaluation"
    assert list((finished / "profile").rglob("*.xplane.pb"))


def test_the_last_state_is_evaluated_as_the_checkpoint_is(run, finished):
    written = [line for line in read(finished) if "eval/loss" in line][-1]
    results = {f"eval/{name}": x for name, x in evaluate_checkpoint(run, finished).items()}
    assert results["eval/step"] == written.pop("step") == 4
    assert written.items() <= results.items()


def test_another_evaluation_leaves_the_run_s_own(run, finished, capsys):
    """From a process where JAX has started, as in a notebook."""
    cli.evaluate(["eval.py", f"--workdir={finished}"])
    own = finished / "eval_validation_4.json"
    before = own.read_text()
    assert json.loads(before)["overrides"] == {}
    plots = finished / "pictures"
    flags = ["--config.eval.num_batches=1", f"--plots={plots}"]
    cli.evaluate(["eval.py", f"--workdir={finished}", *flags])
    (other,) = set(finished.glob("eval_*.json")) - {own}
    assert own.read_text() == before
    assert json.loads(other.read_text())["overrides"] == {"eval.num_batches": "2 -> 1"}
    names = {"density", "kept", "loss_by_position", "weights"}
    assert {file.name for file in plots.iterdir()} == {f"{name}.png" for name in names}
    told = [f"written to {own}", f"pictures are in {plots}", f"written to {other}"]
    assert capsys.readouterr().err.splitlines() == told


def test_a_finished_run_only_says_so(run, finished, capsys):
    before = read(finished)
    loop.train(run, finished)
    assert "done: step 4 is saved" in capsys.readouterr().out
    assert read(finished) == before


def test_a_changed_config_is_refused_or_accepted(run, finished):
    run.optimizer.learning_rate = 1e-4
    with pytest.raises(ConfigError, match="optimizer.learning_rate.*--accept_changed_config"):
        loop.train(run, finished)
    loop.train(run, finished, accept_changed_config=True)


def test_changed_text_is_refused(run, finished, tmp_path_factory):
    text = tmp_path_factory.mktemp("other")
    for split in ("train", "validation"):
        (text / f"{split}.jsonl").write_text(json.dumps({"text": "ab " * 500}))
    run.data.files = (str(text),)
    with pytest.raises(ConfigError, match="data.files.*the training text"):
        loop.train(run, finished)


def test_sampling_is_reproducible_and_stays_in_the_window(run, finished):
    prompts = ["aaa bbb " * 10]
    (text,) = generate(run, finished, prompts, num_tokens=5, seed=1)
    assert text.startswith(prompts[0])
    assert [text] == generate(run, finished, prompts, num_tokens=5, seed=1)


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(run, finished):
    run.model.mlp_dim = 64
    with pytest.raises(ConfigError, match="checkpoint 4 in .* does not fit the config") as error:
        evaluate_checkpoint(run, finished)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no checkpoint of step 3"):
        evaluate_checkpoint(run, finished, step=3)
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        evaluate_checkpoint(run, finished / "nowhere")


def diverging(config, rate):
    """A run whose updates have this size, saved step by step."""
    config.train.accumulation_steps, config.model.dropout = 1, 0.0
    config.optimizer.schedule = "constant"
    config.optimizer.learning_rate = rate
    config.optimizer.warmup_steps = 0
    config.checkpoint.every = 1
    return config


def fail(config, workdir, match):
    """Trains until it fails, with one line; returns that and the last step saved."""
    with pytest.raises(NonFiniteError, match=match) as error:
        loop.train(config, workdir)
    assert "\n" not in str(error.value)
    with Checkpoints(workdir) as checkpoints:
        return str(error.value), checkpoints.latest_step


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    """Parameters of 1e16 are finite, what attention makes of them is not."""
    match = r"step 2: total_loss nan, .*variables are not finite: .*/"
    message, latest = fail(diverging(config, 1e16), tmp_path, match)
    assert latest == 1
    assert "the last good checkpoint is step 1" in message


@pytest.mark.parametrize("rate", [1e30, 1e38])
@pytest.mark.representative("1e+30")
def test_destroyed_parameters_are_not_saved(config, tmp_path, rate):
    """Loss and gradients of the step were fine: they were taken before the update."""
    match = r"step 1: total_loss 5\.\d+, .*param_norm (inf|nan)"
    message, latest = fail(diverging(config, rate), tmp_path, match)
    assert latest is None
    assert "there is no checkpoint" in message


def test_a_norm_that_overflows_alone_names_no_parameter(config, tmp_path):
    """The squares of all parameters do not fit float32, those of the largest do."""
    size = sum(variable.size for variable in ModelDef(config).params.values())
    rate = 1.2 * float(np.sqrt(np.finfo(np.float32).max / size))
    match = r"step 1: .*param_norm inf; each parameter, gradient and variable alone is finite; "
    assert fail(diverging(config, rate), tmp_path, match)[1] is None


def test_a_run_does_not_finish_with_an_evaluation_of_nan(config, tmp_path):
    config.train.num_steps = 1
    _, latest = fail(diverging(config, 1e16), tmp_path, "evaluation loss is nan over")
    assert latest is None
    assert [set(line) & {"eval/loss"} for line in read(tmp_path)] == [set()]
