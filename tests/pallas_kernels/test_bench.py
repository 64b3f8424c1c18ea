"""The benchmark measures what it says, and only what is right."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench import contenders, splash_attention, timing, truth
from pallas_kernels.bench.cases import Case

CASE = Case(128, 0.5, 16, heads=4, kv_heads=2, block_size=32, dtype="float32")


def test_density_of_the_blocks():
    blocks = CASE.block_map
    assert blocks.shape == (2, 4, 4)
    assert (blocks.sum((1, 2)) == 5).all()
    assert not np.triu(blocks, 1).any()
    assert (blocks[0] != blocks[1]).any()
    assert CASE.block_mask().density() == pytest.approx(0.5)


def test_operations_follow_the_visible_pairs():
    pairs = CASE.block_mask().to_dense().sum() * CASE.heads // CASE.kv_heads
    assert CASE.flops() == {"forward": 4 * 16 * pairs, "backward": 10 * 16 * pairs}


def test_a_wrong_result_is_not_timed():
    arrays = CASE.arrays()
    results = list(contenders.ours(CASE, arrays, "xla").results())
    expected = truth.expected(CASE, arrays)
    truth.check(CASE, tuple(results), expected, of="ours")
    results[3] = results[3].at[0, -1, 0, 0].add(0.1)
    with pytest.raises(ValueError, match="ours: d_value is off by"):
        truth.check(CASE, tuple(results), expected, of="ours")


def raising(error):
    def prepare(case, arrays):
        if error:
            raise error
        ready = contenders.ours(case, arrays, "xla")
        return dataclasses.replace(ready, results=lambda: (jnp.full_like(arrays[0], jnp.nan),))

    return prepare


def test_one_that_fails_ends_nothing_and_says_why(monkeypatch):
    truths = []
    compute = truth.expected
    monkeypatch.setattr(truth, "expected", lambda *args: truths.append(args) or compute(*args))
    case = dataclasses.replace(CASE, length=64)
    methods = {
        "breaks": raising(RuntimeError("launch failed")),
        "is wrong": raising(None),
        "xla": functools.partial(contenders.ours, implementation="xla"),
        "cudnn": contenders.BASELINES["cudnn"],
    }
    results = {result.contender: result for result in bench.measure(case, methods, 1)}
    assert {name: result.reason for name, result in results.items()} == {
        "breaks": "RuntimeError: launch failed",
        "is wrong": "ValueError: is wrong: out is off by nan of its largest value",
        "xla": None,
        "cudnn": "cuDNN needs an NVIDIA GPU",
    }
    assert [name for name, result in results.items() if result.ms] == ["xla"]
    assert len(truths) == 1, "the truth of a case is computed once"


def test_every_finished_case_is_on_disk(tmp_path, monkeypatch):
    measure = bench.measure

    def until_killed(case, *args):
        if case.density == 1:
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(bench, "measure", until_killed)
    sizes = "--lengths 64 --densities 0.5 1 --head-dims 16 --heads 2 --kv-heads 1 --block-size 32"
    with pytest.raises(KeyboardInterrupt):
        bench.main(f"{sizes} --rounds 1 --baselines cudnn --out {tmp_path}".split())
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["case"]["density"] for row in report["results"]] == [0.5] * 3


def test_splash_attention_gets_the_same_mask():
    case = Case(256, 0.5, 128, heads=2, kv_heads=2, block_size=128, dtype="float32")
    arrays = case.arrays()
    out = splash_attention.of(case, interpret=True)(*arrays[:3])
    truth.check(case, (out,), truth.expected(case, arrays), of="splash")


def test_median_of_rounds():
    calls = []
    median = timing.median_ms({"one": calls.append}, 3, "label")
    assert calls[:2] == [1, 1]
    assert len(calls) == 5
    assert median["one"] >= 0


def test_a_repeated_pass_holds_one_result_beside_the_next():
    class Result:
        alive = most = 0

        def __init__(self):
            Result.alive += 1
            Result.most = max(Result.most, Result.alive)

        def __del__(self):
            Result.alive -= 1

        def block_until_ready(self):
            pass

    timing.repeated(Result)(50)
    assert (Result.alive, Result.most) == (0, 2)


@pytest.mark.exhaustive
def test_command(tmp_path, capsys):
    sizes = "--lengths 128 --densities 0.5 1 --head-dims 16 --heads 4 --kv-heads 2"
    methods = "--implementations auto pallas_tpu --baselines jax.nn cudnn"
    options = f"{sizes} --block-size 32 --rounds 1 {methods} --out {tmp_path}"
    assert bench.main(options.split()) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    own = [row for row in report["results"] if row["contender"] == "ours (auto)"]
    reasons = {row["contender"]: row["reason"] for row in report["results"] if row["reason"]}
    assert reasons["cudnn"] == "cuDNN needs an NVIDIA GPU"
    assert [row["case"]["density"] for row in own] == [0.5, 1.0]
    assert own[0]["over"].keys() == {"jax.nn", "dense"}
    assert own[0]["ms"].keys() == {"forward", "backward"}
    assert own[0]["temporary_mib"] > 0
    assert (tmp_path / "bench.png").stat().st_size > 0
    printed = capsys.readouterr()
    assert "| 128 | 16 | 0.5 | ours (auto) | forward |" in printed.out
    assert "no ours (pallas_tpu): needs a TPU, this is cpu" in printed.out + printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lengths 100", "length=100 must be a multiple of 64"),
        ("--lengths 0", "length=0 must be at least 1"),
        ("--densities 0", "density=0.0 must be above 0 and at most 1"),
        ("--densities 1.5", "density=1.5 must be above 0"),
        ("--head-dims -8", "head_dim=-8 must be at least 1"),
        ("--kv-heads 0", "kv_heads=0 must be at least 1"),
        ("--block-size 0", "block_size=0 must be at least 1"),
        ("--rounds 0", "rounds=0 must be at least 1"),
        ("--heads 6 --kv-heads 4", "kv_heads=4 must divide heads=6"),
        ("--implementations flash", "invalid choice: 'flash'"),
    ],
)
def test_mistakes(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(options.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_arrays_are_random():
    query, key, *_ = CASE.arrays()
    assert jnp.abs(query).mean() > 0.5
    assert not jnp.array_equal(query[:, :, :2], key)
