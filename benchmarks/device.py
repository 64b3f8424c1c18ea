"""Measures everything worth knowing on a GPU that is at hand for a quarter of an hour.

    python benchmarks/device.py --out=DIR --minutes=9
    python benchmarks/device_tables.py DIR/results.json

Every step is a process of its own with a time limit, so that a kernel that hangs or a
compiler that crashes costs one step. Processes compile side by side, but only one at a
time has its turn on the GPU. DIR/results.json is rewritten whenever a figure arrives, and
DIR/log.txt holds what the steps printed; steps that the time does not allow are left out,
the last ones of `device_plan.steps` first.

Needs the packages of README's installation without data (grain, tensorflow-datasets):
jax with CUDA, flax, optax, ml-collections, jax-triton; PyTorch for FlexAttention, pytest
and pytest-xdist for the tests. What is missing is a row that says so. To carry what an
image with jax, flax, optax and torch for Python 3.12 lacks:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl \\
        jax-triton==0.3.1 ml-collections==1.1.0

`--platform=cpu` runs the same steps at toy sizes, to see that they work.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

from device_plan import Step, steps

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "device_steps.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps that the command line asks for; returns the exit code."""
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = chosen(steps(args.platform), args.only)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    command = "python benchmarks/device.py " + given.replace(str(args.out), "DIR")
    with tempfile.TemporaryDirectory(prefix="device-") as scratch:
        with (args.out / "log.txt").open("a", encoding="utf-8") as log:
            run = Run(plan, args, pathlib.Path(scratch), log, command)
            run.until_done()
    print(run.summary())
    return 0 if run.is_green() else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="then stop (default: 9)")
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu", help="default: gpu")
    parser.add_argument(
        "--only", default="", help="run steps whose names match this regular expression"
    )
    jobs = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes (default: {jobs})")
    args = parser.parse_args(arguments)
    try:
        if not chosen(steps(args.platform), args.only):
            parser.error(f"--only={args.only}: matches no step, like 'time mosaic_gpu 64 0.1'")
    except re.error as error:
        parser.error(f"--only={args.only}: {error}")
    if args.jobs < 1 or not args.minutes > 0:
        parser.error(f"--jobs={args.jobs} --minutes={args.minutes:g}: must be positive")
    return args


def chosen(plan: Sequence[Step], pattern: str) -> list[Step]:
    """Returns the steps whose names match, and those that must have ended before them."""
    found = [step for step in plan if re.search(pattern, step.name)]
    needed = {name for step in found for name in step.after}
    return [step for step in plan if step in found or step.name in needed]


@dataclasses.dataclass
class Child:
    """A step that runs.

    Attributes:
        step: what it does.
        process: leads a session of its own, with whatever the step starts.
        since: when it entered its state, in seconds.
        state: "compiling", "waiting" for its turn, on the "gpu", or "done".
        gpu_seconds: that it was on the GPU before.
    """

    step: Step
    process: subprocess.Popen[str]
    since: float
    state: str = "compiling"
    gpu_seconds: float = 0.0
    pending: bytes = b""


class Run:
    """Starts steps in order, gives one at a time its turn on the GPU, keeps the results."""

    def __init__(
        self,
        plan: Sequence[Step],
        args: argparse.Namespace,
        scratch: pathlib.Path,
        log: IO[str],
        command: str,
    ) -> None:
        self._queue = list(plan)
        self._planned = [step.name for step in plan]
        self._args = args
        self._scratch = scratch
        self._log = log
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._start = time.monotonic()
        self._status: dict[str, dict[str, Any]] = {
            step.name: {"status": "not started"} for step in plan
        }
        self._rows: list[dict[str, Any]] = []
        self._results = {
            "command": command,
            "date": time.strftime("%Y-%m-%d"),
            "steps": self._status,
            "rows": self._rows,
        }
        self._save()

    def until_done(self) -> None:
        """Runs until all steps have ended or the time is up."""
        try:
            while (self._queue or self._children) and self._seconds_left() > 0:
                self._fill()
                for key, _ in self._selector.select(timeout=0.1):
                    self._read(key.data)
                self._give_turn()
                for child in list(self._children):
                    self._end_if_overdue(child)
        finally:
            for child in list(self._children):
                self._end(child, "stopped", "the time was up")

    def is_green(self) -> bool:
        """Returns whether every step ended well and no check failed."""
        are_right = all(row.get("passed", True) for row in self._rows)
        return are_right and all(step["status"] == "ok" for step in self._status.values())

    def summary(self) -> str:
        """Returns a line for each step that did not end well, and for each failed check."""
        lines = [
            f"{name}: {step['status']} {step.get('error', '')}".rstrip()
            for name, step in self._status.items()
            if step["status"] != "ok"
        ]
        lines += [
            f"{row['step']}: wrong: {row}" for row in self._rows if not row.get("passed", True)
        ]
        done = sum(step["status"] == "ok" for step in self._status.values())
        lines.append(f"{done} of {len(self._status)} steps in {self._seconds():.0f} s")
        return "\n".join(lines)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._start, 2)

    def _seconds_left(self) -> float:
        return 60 * self._args.minutes - self._seconds()

    def _fill(self) -> None:
        while self._queue and len(self._children) < self._args.jobs:
            if any(child.step.is_alone for child in self._children):
                return
            self._launch(self._queue.pop(0))

    def _launch(self, step: Step) -> None:
        out = str(self._args.out.resolve())
        job = {"function": step.function, "arguments": step.arguments, "out": out}
        command = [sys.executable, str(SCRIPT), json.dumps(job)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        child = Child(step, process, time.monotonic())
        self._children.append(child)
        self._status[step.name] = {"status": "running", "started": self._seconds()}
        self._selector.register(process.stdout, selectors.EVENT_READ, child)

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return os.environ | {
            "JAX_PLATFORMS": "cpu" if self._args.platform == "cpu" else "cuda,cpu",
            # Several processes, and PyTorch, share the memory of the GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "DEVICE_SCRATCH": str(self._scratch),
            "TRITON_CACHE_DIR": str(self._scratch / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self._scratch / "inductor"),
        }

    def _read(self, child: Child) -> None:
        """Takes the messages of a step: lines of JSON."""
        data = os.read(child.process.stdout.fileno(), 2**16)
        if not data:
            self._end(child)
            return
        *lines, child.pending = (child.pending + data).split(b"\n")
        # A library may have printed something before the step took its output away.
        for message in (json.loads(line) for line in lines if line.startswith(b"{")):
            if "row" in message:
                self._rows.append({"step": child.step.name} | message["row"])
                self._save()
            elif "error" in message:
                self._status[child.step.name]["error"] = message["error"]
            else:
                self._enter(child, message["state"])

    def _enter(self, child: Child, state: str) -> None:
        now = time.monotonic()
        if child.state == "gpu":
            child.gpu_seconds += now - child.since
        if child.state != state:
            self._print(f"{child.step.name}: {child.state} for {now - child.since:.1f} s")
        child.state, child.since = state, now

    def _give_turn(self) -> None:
        if any(child.state == "gpu" for child in self._children):
            return
        running = {child.step.name for child in self._children}
        running |= {step.name for step in self._queue}
        for child in sorted(self._children, key=lambda c: self._planned.index(c.step.name)):
            if child.state == "waiting" and not running & set(child.step.after):
                self._enter(child, "gpu")
                # Where it has died, the end of its messages is read next.
                with contextlib.suppress(BrokenPipeError):
                    child.process.stdin.write("go\n")
                    child.process.stdin.flush()
                return

    def _end_if_overdue(self, child: Child) -> None:
        limits = {"compiling": child.step.compile_limit, "gpu": child.step.gpu_limit}
        limit = limits.get(child.state)
        if limit is not None and time.monotonic() - child.since > limit:
            self._end(child, "overdue", f"{child.state} for more than {limit:.0f} s")

    def _end(self, child: Child, status: str | None = None, error: str | None = None) -> None:
        """Kills what is left of a step's processes and notes how it ended."""
        code = None
        if status is None:
            code = _wait(child.process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        _wait(child.process)
        self._enter(child, "done")
        self._children.remove(child)
        self._selector.unregister(child.process.stdout)
        child.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.process.stdin.close()
        own = self._status[child.step.name]
        own["status"] = status or ("ok" if code == 0 else "failed")
        own |= {"ended": self._seconds(), "gpu_seconds": round(child.gpu_seconds, 2)}
        if own["status"] != "ok":
            own["error"] = error or own.get("error", f"exit code {code}")
        self._print(f"{child.step.name}: {own['status']} {own.get('error', '')}".rstrip())
        self._save()

    def _print(self, line: str) -> None:
        line = f"{self._seconds():6.1f} {line}"
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

    def _save(self) -> None:
        path = self._args.out / "results.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._results, indent=1), encoding="utf-8")
        temporary.replace(path)


def _wait(process: subprocess.Popen[str]) -> int | None:
    """Returns the exit code; None for a process that the driver does not let go."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=10)
    return None


if __name__ == "__main__":
    sys.exit(main())
