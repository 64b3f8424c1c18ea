"""What may differ when a run resumes, and where it goes on in the data."""

import json
import re

import numpy as np
import pytest

from sparseformer_jax import data
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training import loop
from sparseformer_jax.training.changes import compare
from sparseformer_jax.training.checkpoint import Checkpoints


def changed(config, **values):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return other


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"train__log_every": 7}, ["train.log_every: 1 -> 7"]),
        ({"mesh__fsdp": 8, "eval__every": 3}, ["mesh.fsdp: 1 -> 8", "eval.every: 0 -> 3"]),
        ({"checkpoint__every": 1, "data__prefetch": 1}, ["checkpoint.every: 2 -> 1", "data.prefetch: 16 -> 1"]),
        ({"data__files": ("moved",)}, ["data.files: .* -> .'moved',."]),
    ],
)  # fmt: skip
def test_what_leaves_the_mathematics_alone_is_harmless(config, values, lines):
    changes = compare(config, changed(config, **values), same_text=True)
    assert not changes.changing
    assert len(changes.harmless) == len(lines)
    for line in lines:
        assert any(re.fullmatch(line, change) for change in changes.harmless)


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer__learning_rate": 1.0},
        {"train__batch_size": 8},
        {"train__accumulation_steps": 1},
        {"data__seq_len": 16},
        {"model__dropout": 0.0},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_changes_the_run_is_told(config, values):
    changes = compare(config, changed(config, **values), same_text=True)
    assert len(changes.changing) == 1
    assert not changes.harmless


def test_the_number_of_steps_changes_a_run_whose_schedule_ends_there(config):
    longer = changed(config, train__num_steps=9)
    (line,) = compare(config, longer, same_text=True).changing
    assert line == "train.num_steps: 6 -> 9 (where optimizer.schedule=cosine ends)"
    constant = changed(config, optimizer__schedule="constant")
    changes = compare(constant, changed(constant, train__num_steps=9), same_text=True)
    assert changes.harmless == ("train.num_steps: 6 -> 9",)


def test_other_text_at_the_same_paths_changes_the_run(config):
    moved = changed(config, data__files=("moved",))
    for other in (config, moved):
        changes = compare(config, other, same_text=False)
        assert "the training text" in changes.changing
        assert not changes.harmless


@pytest.mark.exhaustive
def test_another_batch_neither_replays_nor_skips(run, finished, monkeypatch):
    """After 4 steps of 16 in 2 pieces, 2 of 24 in 3 take the examples from 64 on."""
    taken = []
    draw = loop.TrainBatches.__next__

    def record(self):
        batch = draw(self)
        taken.append(np.concatenate(np.asarray(batch["inputs"])))
        return batch

    monkeypatch.setattr(loop.TrainBatches, "__next__", record)
    run.train.num_steps, run.train.batch_size, run.train.accumulation_steps = 6, 24, 3
    with pytest.raises(ConfigError, match="train.batch_size: 16 -> 24; .*--accept_changed_config"):
        loop.train(run, finished)
    loop.train(run, finished, accept_changed_config=True)

    corpus = data.load_corpus(run.data, "train", data.make_tokenizer(run.data))
    stream = data.train_iterator(corpus, seq_len=32, batch_size=112, seed=run.seed)
    np.testing.assert_array_equal(np.concatenate(taken), next(stream)["inputs"][64:])
    stream.close()
    with Checkpoints(finished) as checkpoints:
        assert checkpoints.meta(6).data == {"examples": 112}


def test_harmless_changes_are_told_in_one_line(run, finished, capsys):
    run.train.log_every, run.mesh.data, run.mesh.fsdp = 3, 4, 2
    loop.train(run, finished)
    lines = capsys.readouterr().out.splitlines()
    line = "the same run with mesh.data: -1 -> 4; mesh.fsdp: 1 -> 2; train.log_every: 1 -> 3"
    assert line in lines


def test_the_state_of_another_optimizer_is_refused_with_a_way_on(run, finished):
    run.optimizer.name = "muon"
    with pytest.raises(ConfigError, match="does not fit the config: .*opt_state") as error:
        loop.train(run, finished, accept_changed_config=True)
    assert str(error.value).endswith(
        f"; a new workdir with --config.init_from={finished}:4 takes the parameters alone"
    )


def test_a_shorter_run_says_that_nothing_was_trained(run, finished, capsys):
    run.train.num_steps = 2
    loop.train(run, finished, accept_changed_config=True)
    printed = capsys.readouterr().out
    assert "done: step 4 is saved" in printed
    assert "beyond train.num_steps=2: nothing was trained" in printed


@pytest.mark.exhaustive
def test_an_older_step_leaves_the_newer_ones_behind(run, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    (finished / "eval_validation_4.json").write_text('{"step": 4}')
    (finished / "eval_validation_2.json").write_text('{"step": 2}')
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3 .* there are \[2, 4\]"):
        loop.train(run, finished, step=3)
    for file in (finished / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"checkpoint 4 .* others are \[2\]: --step=2"):
        loop.train(run, finished)

    run.train.num_steps = 3
    loop.train(run, finished, step=2, accept_changed_config=True)
    (folder,) = (finished / "left_behind").iterdir()
    assert f"beyond step 2 is left behind, in {folder}" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        *("4", "metrics.jsonl", "eval_validation_4.json")
    }
    assert (folder / "metrics.jsonl").read_text() == before
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 3
    assert (finished / "eval_validation_2.json").exists()
    with Checkpoints(finished) as checkpoints:
        assert checkpoints.latest_step == 3
