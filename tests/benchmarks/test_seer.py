"""The benchmarks of gates: what they print of rows, and that what they time runs."""

import importlib
import math
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_what_gates_close_is_of_logarithms(load, tmp_path, capsys):
    seer = load("seer")
    found = {"oracle": 2.0, "gate": 4.0, "random gate": 16.0}
    rows = [("dense", 1.0, {"text": 2.0, "pass key": 9})]
    for amount in seer.GATES["blocks"][2]:
        for name in seer.SELECTORS:
            rows.append((name, amount, {"text": found.get(name, 8.0), "pass key": 3}))
    seer.print_table("blocks", rows, tmp_path)
    table, closed = capsys.readouterr().out.split("\n\n")
    assert table.splitlines()[2:5:2] == [
        "| all | dense | 2.00 | 9 of 10 |",
        "| 0.5 | gate | 4.00 | 3 of 10 |",
    ]
    assert closed.splitlines()[2:] == [f"| {x:g} | {2 / 3:.1%} |" for x in (0.5, 0.3, 0.2, 0.1)]
    assert (tmp_path / "seer_blocks.png").stat().st_size > 1000


@pytest.mark.exhaustive
def test_what_is_timed_runs(load):
    times = load("seer_time").attention_times(256, 0.5, 1)
    assert len(times) == 3
    assert all(0 < ms < math.inf for ms in times)
