"""The command for a GPU that is lent for minutes: no step costs another one its time."""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Speaks as device_steps.py does, and starts at once: no JAX.
SCRIPT = """
import json, os, pathlib, subprocess, sys, time

job = json.loads(sys.argv[1])
out, do = pathlib.Path(job["out"]), job["arguments"]

def send(**message):
    print(json.dumps(message), flush=True)

print("a library says hello", flush=True)
if do.get("hangs_before"):
    time.sleep(60)
send(state="waiting")
if do.get("dies_waiting"):
    os._exit(3)
sys.stdin.readline()
if do.get("hangs"):
    own = subprocess.Popen(["sleep", "60"])
    (out / "pid").write_text(str(own.pid))
    time.sleep(60)
began = time.monotonic()
time.sleep(0.05)
send(row={"kind": "turn", "began": began, "ended": time.monotonic()})
if do.get("fails"):
    send(error="RuntimeError: launch failed")
    sys.exit(1)
"""


@pytest.fixture
def device(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("device")
    for name in ("device", "device_plan", "device_tables"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(device, monkeypatch, tmp_path):
    """A function that runs made-up steps, and returns the exit code and the results."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(plan, *options):
        monkeypatch.setattr(device, "SCRIPT", script)
        monkeypatch.setattr(device, "steps", lambda platform: plan)
        code = device.main([f"--out={tmp_path}", "--jobs=8", *options])
        return code, json.loads((tmp_path / "results.json").read_text())

    return run


def step(device, name, after=(), **arguments):
    return device.Step(name, "any", arguments, compile_limit=2, gpu_limit=2, after=after)


def is_running(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_steps_have_the_gpu_one_at_a_time_and_after_what_they_need(device, run):
    plan = [step(device, "needs last", after=("last",))]
    plan += [step(device, name) for name in ("one", "two", "three", "last")]
    code, results = run(plan)
    assert code == 0
    assert {own["status"] for own in results["steps"].values()} == {"ok"}
    turns = results["rows"]
    names = [turn["step"] for turn in turns]
    assert sorted(names) == sorted(["needs last", "one", "two", "three", "last"])
    assert names.index("needs last") > names.index("last")
    for one, other in zip(turns, turns[1:], strict=False):
        assert one["ended"] <= other["began"]


def test_nothing_starts_beside_a_step_that_is_alone(device, run):
    alone = dataclasses.replace(step(device, "alone"), is_alone=True)
    code, results = run([alone, step(device, "other")])
    assert code == 0
    assert results["steps"]["other"]["started"] >= results["steps"]["alone"]["ended"]


def test_a_step_that_hangs_or_dies_costs_itself_alone(device, run, tmp_path):
    plan = [
        step(device, "hangs", hangs=True),
        step(device, "hangs before", hangs_before=True),
        step(device, "dies", dies_waiting=True),
        step(device, "fails", fails=True),
        step(device, "good"),
    ]
    start = time.monotonic()
    code, results = run(plan)
    assert time.monotonic() - start < 20
    assert code == 1
    ended = {name: (own["status"], own.get("error")) for name, own in results["steps"].items()}
    assert ended == {
        "hangs": ("overdue", "gpu for more than 2 s"),
        "hangs before": ("overdue", "compiling for more than 2 s"),
        "dies": ("failed", "exit code 3"),
        "fails": ("failed", "RuntimeError: launch failed"),
        "good": ("ok", None),
    }
    assert not is_running(int((tmp_path / "pid").read_text())), "what it started is killed too"


def test_the_time_is_kept(device, run):
    start = time.monotonic()
    code, results = run(
        [step(device, "hangs", hangs=True), step(device, "late")], "--minutes=0.02", "--jobs=1"
    )
    assert time.monotonic() - start < 10
    assert code == 1
    states = {name: own["status"] for name, own in results["steps"].items()}
    assert states == {"hangs": "stopped", "late": "not started"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--only=nothing", "--only=nothing: matches no step"),
        ("--only=(", "--only=(: missing )"),
        ("--jobs=0", "--jobs=0 --minutes=9: must be positive"),
        ("--minutes=nan", "--minutes=nan: must be positive"),
    ],
)
def test_mistakes(device, option, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        device.main([f"--out={tmp_path}", option])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_steps_bring_what_they_need(device):
    plan = device.steps("gpu")
    names = [own.name for own in device.chosen(plan, "time mosaic_gpu 64 0.1$")]
    assert names == ["truth 64 0.1", "time mosaic_gpu 64 0.1"]
    assert len({own.name for own in plan}) == len(plan)
    functions = {own.function for own in plan}
    source = (ROOT / "benchmarks/device_steps.py").read_text()
    assert all(f"\ndef {name}(" in source for name in functions)


@pytest.mark.exhaustive
def test_real_steps_on_a_cpu(device, tmp_path, capsys):
    """A measurement, and one that cannot run here."""
    only = "--only=machine|check (mosaic_gpu|xla)$"
    assert device.main([f"--out={tmp_path}", "--platform=cpu", "--jobs=2", only]) == 0
    tables = importlib.import_module("device_tables")
    assert tables.main([str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 steps in" in printed
    assert "TFLOP/s in a product of bfloat16 matrices" in printed
    assert "| attention | xla | 128 | 16 |" in printed
    assert "| check mosaic_gpu | mosaic_gpu: needs an NVIDIA GPU of the Hopper" in printed
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "results.json"]


@pytest.mark.exhaustive
def test_every_step_on_a_cpu(device, tmp_path, capsys):
    assert device.main([f"--out={tmp_path}", "--platform=cpu", "--jobs=2"]) == 0
    tables = importlib.import_module("device_tables")
    assert tables.main([str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    for title in ("Attention", "Building lists", "float32 against float64", "Training steps"):
        assert f"#### {title}" in printed
    assert "| pytest xla | 1 | 0 | 0 |" in printed


def test_table_of_attention(device):
    tables = importlib.import_module("device_tables")
    case = {"block_size": 64, "density": 0.5, "length": 256, "head_dim": 16}
    ms = {"cudnn": 8.0, "flex": 6.0, "mosaic_gpu": 2.0}
    rows = [
        {"kind": "time", "contender": name, "case": case, "pass": "forward", "tflops": 300.0}
        | {"ms": own, "ms_min": own, "ms_max": own + 1}
        for name, own in ms.items()
    ]
    _, *body = tables.attention(rows, 800.0)
    rows[-1]["is_checked"] = False
    assert tables.attention(rows, 800.0)[-1][3] == "mosaic_gpu (not checked)"
    assert body[-1] == ["64", "0.5", "forward", "mosaic_gpu", "2", "2 to 3", "300", "38 %"] + [
        "4.00x",
        "3.00x",
    ]
