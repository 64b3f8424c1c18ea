"""The folder of a run: made, written whole or not at all, and cleared of what is left behind."""

import dataclasses
import datetime
import json
import os
import shutil
from pathlib import Path

from sparseformer_jax.checks import ConfigError

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class History:
    """What metrics.jsonl holds of a run that resumes.

    Attributes:
      is_evaluated: whether the step it resumes from was evaluated.
      unreadable: how many lines were no JSON, as the last one of a killed run.
    """

    is_evaluated: bool = False
    unreadable: int = 0


def make_folder(workdir: Path) -> None:
    """Makes the folder of a run, unless it is there.

    Raises:
      ConfigError: something stands in its way, or it cannot be written.
    """
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        way = f": {error.filename}" if error.filename != str(workdir) else ""
        raise ConfigError(
            f"--workdir={workdir}: cannot be made or written{way}: {error.strerror}; "
            "take another folder"
        ) from None


def take_up(workdir: Path, step: int) -> History:
    """Drops from metrics.jsonl what a killed run wrote after `step`, and what is no JSON."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return History()
    kept, unreadable, is_evaluated = [], 0, False
    for line in path.read_bytes().splitlines():
        try:
            numbers = json.loads(line)
            written_at = int(numbers["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        if written_at <= step:
            kept.append(line.decode() + "\n")
            is_evaluated = is_evaluated or (written_at == step and "eval/loss" in numbers)
    write_atomically(path, "".join(kept))
    return History(is_evaluated, unreadable)


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
