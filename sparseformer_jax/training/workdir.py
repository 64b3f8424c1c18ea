"""The folder of a run: made, written whole or not at all, and cleared of what is left behind."""

import datetime
import json
import os
import shutil
from pathlib import Path

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that a reader, or a run that is killed, sees whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def leave_behind(workdir: Path, step: int) -> Path | None:
    """Moves what a run has beyond a step out of its way, and returns where to.

    Its checkpoints and evaluations go to a new folder in `left_behind`, with a copy of
    metrics.jsonl, so that none is later taken for the newest of the run that goes on from
    `step`. None: there is nothing beyond.
    """
    beyond = [path for path in _checkpoints(workdir) if int(path.name) > step]
    beyond += [path for path in workdir.glob("eval_*.json") if _step_of(path) > step]
    if not beyond:
        return None
    now = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    folder = workdir / "left_behind" / f"{now}_beyond_{step}"
    folder.mkdir(parents=True)
    if (workdir / METRICS_FILE).exists():
        shutil.copy2(workdir / METRICS_FILE, folder)
    for path in beyond:
        path.rename(folder / path.name)
    return folder


def _checkpoints(workdir: Path) -> list[Path]:
    return [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]


def _step_of(path: Path) -> int:
    """The step an evaluation is of; -1: the file is of another kind."""
    try:
        return int(json.loads(path.read_text())["step"])
    except (ValueError, KeyError, TypeError):
        return -1
