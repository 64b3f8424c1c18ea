"""Runs commands in a process of their own, as a user would, but several in one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300

# Reads [[command, [flag, ...]], ...] and ends the stderr of each with "\0 exit code".
DRIVER = r"""
import json, sys, traceback
from sparseformer_jax import cli
for command, flags in json.load(sys.stdin):
    code = 0
    try:
        getattr(cli, command)([command, *flags])
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        code = 1
    print(f"\0{code}", file=sys.stderr, flush=True)
"""


def run(commands: list[tuple[str, list[str]]], **env: str) -> list[tuple[int, list[str]]]:
    """Runs commands in one process; returns the exit code and the stderr of each, in lines."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER],
        input=json.dumps(commands),
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **env},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    *outputs, rest = process.stderr.split("\0")
    # What follows a mark is the exit code and the stderr of the next command.
    codes = [int(text.partition("\n")[0]) for text in [*outputs[1:], rest]]
    texts = [outputs[0], *(text.partition("\n")[2] for text in outputs[1:])]
    assert rest.partition("\n")[2] == "", "nothing is said when the process ends"
    assert process.returncode == 0, process.stderr
    return list(zip(codes, (text.splitlines() for text in texts), strict=True))


def mistake(command: Callable[..., None], capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """Returns the one line with which a command of this process ends, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
