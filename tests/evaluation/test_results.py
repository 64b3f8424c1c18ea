"""What an evaluation's file is called, and what stays when another one is made."""

import pytest

from sparseformer_jax import default_config
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation import results
from sparseformer_jax.training.changes import evaluated_differently

OWN = {"step": 20, "split": "validation", "text": "abc", "overrides": {}, "loss": 1.5}


def test_the_run_s_own_evaluation_has_the_short_name():
    assert results.file_name(OWN) == "eval_validation_20.json"
    assert results.file_name(OWN | {"loss": 2.0}) == "eval_validation_20.json"


def test_every_other_evaluation_has_a_name_of_its_own():
    text = {"overrides": {"text": "not that of the run"}}
    others = [
        OWN,
        OWN | {"step": 10},
        OWN | {"split": "test"},
        OWN | text,
        OWN | text | {"text": "abcd"},
        OWN | {"overrides": {"attention.block_size": "8 -> 16"}},
        OWN | {"overrides": {"eval.num_batches": "8 -> 0"}},
    ]
    names = {results.file_name(other) for other in others}
    assert len(names) == len(others)


def test_a_replaced_file_is_told(tmp_path):
    path = tmp_path / "a.json"
    assert results.write(path, OWN) == f"written to {path}"
    assert results.write(path, OWN) == f"written to {path}, in place of an earlier file"


def test_overflow_is_told():
    assert results.warnings(OWN) == results.warnings(OWN | {"overflow": 0.0}) == []
    (line,) = results.warnings(OWN | {"overflow": 0.03125})
    assert line.startswith("overflow is 0.0312: ")


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    results.check_folder("--output", tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"--output=.*there is no folder .*nowhere"):
        results.check_folder("--output", tmp_path / "nowhere" / "a.json")
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        results.check_folder("--output", tmp_path)


def test_what_makes_another_evaluation():
    old, new = default_config.get_config(), default_config.get_config()
    new.train.num_steps, new.mesh.fsdp, new.eval.every, new.data.prefetch = 5, 2, 3, 1
    new.data.files = ("moved",)  # the fingerprint tells whether it is other text
    assert evaluated_differently(old, new) == {}
    new.sparsity.init_std = 0.1  # of the start alone
    assert evaluated_differently(old, new) == {}
    new.attention.block_size, new.eval.num_batches, new.data.seq_len = 8, 0, 64
    new.sparsity.targets = ("ff=3:4",)
    assert evaluated_differently(old, new) == {
        "attention.block_size": "absent -> 8",
        "eval.num_batches": "16 -> 0",
        "data.seq_len": "512 -> 64",
        "sparsity.targets": "absent -> ('ff=3:4',)",
    }
