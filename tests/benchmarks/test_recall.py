"""The benchmark of recall: every question has one answer, too far for local heads, and is learnt."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax.build import make_model

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def recall(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("recall")


@pytest.mark.parametrize("pair", [False, True])
def test_every_question_has_one_answer(recall, pair):
    task = recall.Recall(pair=pair)
    batch, distances = task.with_distances(50, 3)
    inputs, values = batch["inputs"], task.num_values
    first_joint = values + task.num_keys + task.num_noise
    assert inputs.max() < task.vocab_size
    assert (np.sum(distances > 0, axis=1) == task.num_definitions).all()
    np.testing.assert_array_equal(batch["weights"], distances > 0)
    for row, at in np.argwhere(distances > 0):
        tokens, key = inputs[row], inputs[row, at] - values
        answer = at - distances[row, at]
        assert 0 <= key < task.num_keys
        assert 0 <= batch["targets"][row, at] < values
        if pair:
            found = np.flatnonzero(tokens[:at] == values + key) + 1
            told = tokens[answer]
        else:
            found = np.flatnonzero((tokens - first_joint) // values == key)
            told = (tokens[answer] - first_joint) % values
        defined = found[found < task.num_definitions * task.cell_size]
        assert defined.tolist() == [answer]
        assert told == batch["targets"][row, at]


def test_a_question_lies_beyond_what_layers_of_blocks_reach(recall):
    task = recall.Recall()
    _, distances = task.with_distances(50, 3)
    own = distances[distances > 0]
    assert own.min() >= task.gap > recall.BLOCK
    assert own.max() < task.seq_len
    # A block tells nothing to the next, however many layers there are.
    assert task.first_question % recall.BLOCK == 0


def test_rows_follow_from_the_seed(recall):
    task = recall.Recall()
    first, again, other = (task.batch(4, recall.TRAIN, 0, step) for step in (7, 7, 8))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["inputs"] != other["inputs"]).any()
    assert (first["inputs"] != task.batch(4, recall.TEST)["inputs"]).any()


@pytest.mark.parametrize("name", ["routing, local alone", "combiner, blocks alone", "dense"])
def test_local_twins_see_no_definition(recall, name):
    task = recall.Recall(seq_len=24, num_definitions=2, gap=8, num_keys=2)
    config = recall.make_config(task, recall.METHODS[name], seed=0, steps=10, rate=1e-3)
    inputs = jnp.asarray(task.batch(1, 0)["inputs"])
    told_otherwise = inputs.at[:, : task.first_question].set(0)
    both = jnp.concatenate([inputs, told_otherwise])
    logits = jax.jit(lambda x: make_model(config, rngs=nnx.Rngs(0))(x).logits)(both)
    first, second = logits[:, task.first_question :]
    assert bool((first == second).all()) == (name != "dense")


@pytest.mark.exhaustive
def test_dense_learns_a_small_task_and_reports_it(recall, tmp_path):
    task = recall.Recall(seq_len=24, num_definitions=2, gap=8, num_keys=2, num_values=2)
    config = recall.make_config(task, recall.METHODS["dense"], seed=0, steps=40, rate=1e-2)
    row = {"method": "dense", "seed": 0} | recall.learn(config, task, every=20)
    assert row["steps"] == [20, 40]
    assert row["accuracy"][-1] > 0.9  # a guess is right half of the time
    assert row["accuracy_by_distance"][0] > 0.5
    assert recall.accuracy_table([row]).splitlines()[2].startswith("| dense | ")
    recall.draw([row], tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_is_told_by_distance(recall):
    distances = np.array([[0, 1, 2], [0, 99, 100]])
    right = np.array([[True, True, False], [True, True, True]])
    centres, accuracy = recall.by_distance(right, distances)
    np.testing.assert_allclose(centres, [1 + 50 / 7, 101 - 50 / 7])
    assert accuracy == [0.5, 1]
