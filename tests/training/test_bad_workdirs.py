"""Workdirs that cannot be used: one line on stderr, exit code 2, and nothing lost.

The table runs in this process; some of it, and all of it in `pytest -m exhaustive`, in real ones.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from sparseformer_jax import cli
from tests.training.processes import ROOT


class Bad(NamedTuple):
    """What stands in the folder `run` of a finished run's copy, and what is said of it."""

    command: str
    spoil: Callable[[Path], object]
    message: str
    workdir: str = "run"
    flags: tuple[str, ...] = ()


def replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


def checkpoints_a_file(run: Path) -> None:
    (run / "checkpoints").rename(run / "away")
    (run / "checkpoints").touch()


def lock_a_folder(run: Path) -> None:
    (run / ".lock").unlink()
    (run / ".lock").mkdir()


def cut_checkpoint(run: Path) -> None:
    """As a disk that was full, or a copy that was interrupted, leaves it."""
    for file in (run / "checkpoints/4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])


def nothing(run: Path) -> None:
    """The copy is as training left it."""


TABLE = {
    "a file": Bad("train", nothing, r"--workdir=.*config\.json: cannot be .*File exists|Not a", workdir="run/config.json"),
    "below a file": Bad("train", nothing, "--workdir=.*Not a directory", workdir="run/config.json/new"),
    "not possible": Bad("train", nothing, "--workdir=/proc/new: cannot be made", workdir="/proc/new"),
    "empty": Bad("train", nothing, "--workdir=...: missing", workdir=""),
    "checkpoints a file": Bad("train", checkpoints_a_file, "--workdir=.*checkpoints: File exists"),
    "lock a folder": Bad("train", lock_a_folder, r"\.lock: Is a directory"),
    "no such step": Bad("train", nothing, r"no checkpoint of step 3 .* there are \[2, 4\]", flags=("--step=3",)),
    "eval, empty": Bad("eval", nothing, "--workdir=...: missing", workdir=""),
    "eval, a file": Bad("eval", nothing, "has no config.json", workdir="run/config.json"),
    "eval, checkpoints a file": Bad("eval", checkpoints_a_file, "holds no checkpoints"),
    "config.json empty": Bad("eval", replace("config.json", b""), "config.json: is no config, or a damaged one"),
    "config.json cut": Bad("eval", replace("config.json", b'{"seed": 0, "mod'), "config.json: is no config, or a damaged one"),
    "config.json binary": Bad("eval", replace("config.json", b"\xff\x00\xfe"), "config.json: is no config, or a damaged one"),
    "config.json a list": Bad("eval", replace("config.json", b"[]"), "config.json: is no config: it holds no keys"),
    "config.json too deep": Bad("eval", replace("config.json", b"[" * 100_000), "config.json: is no config, or a damaged one"),
    "config.json of strange types": Bad("eval", replace("config.json", b'{"seed": {"none": "evil"}}'), "config.json: is no config, or a damaged one"),
    "checkpoint of cut files": Bad("eval", cut_checkpoint, r"checkpoint 4 in .* is damaged.*: its metadata .*--step=2"),
    "output in a missing folder": Bad("eval", nothing, "--output=/nowhere/a.json: there is no folder /nowhere", flags=("--output=/nowhere/a.json",)),
    "output a folder": Bad("eval", nothing, "--output=/: is a folder", flags=("--output=/",)),
    "other layers": Bad("eval", nothing, "does not fit the config: missing: layers/2/", flags=("--config.model.num_layers=3",)),
    "other width": Bad("eval", nothing, "does not fit the config: misshapen: layers/0/", flags=("--config.model.mlp_dim=64",)),
}  # fmt: skip
IN_PROCESSES = ("other layers",)


def argv(bad: Bad, finished: Path) -> list[str]:
    """The command's arguments, on a copy that is spoilt first."""
    config = finished.parent / "config.py"
    config.write_text(
        "from sparseformer_jax.config import from_json\n"
        f"def get_config():\n    return from_json({(finished / 'config.json').read_text()!r})\n"
    )
    bad.spoil(finished)
    workdir = str(finished.parent / bad.workdir) if bad.workdir else ""
    own = [f"--config={config}"] if bad.command == "train" else []
    return [f"{bad.command}.py", *own, f"--workdir={workdir}", *bad.flags]


def contents(folder: Path) -> dict[str, int]:
    """Name and size of every file but the lock's, which a failed run may leave."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


@pytest.mark.parametrize("bad", TABLE.values(), ids=TABLE)
def test_a_bad_workdir_is_one_line(bad, run, finished, capfd):
    arguments = argv(bad, finished)
    before = contents(finished)
    command = cli.train if bad.command == "train" else cli.evaluate
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(bad.message, line)
    assert contents(finished) == before


def _process(name: str) -> object:
    marks = () if name in IN_PROCESSES else (pytest.mark.exhaustive,)
    return pytest.param(TABLE[name], id=name, marks=marks)


@pytest.mark.parametrize("bad", [_process(name) for name in TABLE])
def test_a_process_says_no_more(bad, run, finished):
    name, *arguments = argv(bad, finished)
    ended = subprocess.run(
        [sys.executable, name, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert re.search(bad.message, line)


def test_lines_that_were_cut_are_dropped_and_told(run, finished, capsys):
    """A killed run leaves half a line; its resumption must not fail for it."""
    from sparseformer_jax.training import loop

    file = finished / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 4, "train/lo')
    loop.train(run, finished)
    assert "metrics.jsonl: dropped 1 lines that are cut or damaged" in capsys.readouterr().out
    assert file.read_text() == whole
