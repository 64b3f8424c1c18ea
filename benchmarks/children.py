"""Commands that a benchmark runs, each in a process of its own, and what they cost."""

import resource
import subprocess
import sys
from collections.abc import Sequence


def run(command: Sequence[str], *, stdout: int | None = None) -> tuple[float, str]:
    """Returns the CPU seconds of a command, and what it printed where `stdout` is a pipe.

    Where it fails, it has said why, and this process ends with its exit code.
    """
    before = _seconds()
    done = subprocess.run(command, stdout=stdout, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return _seconds() - before, done.stdout or ""


def _seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
