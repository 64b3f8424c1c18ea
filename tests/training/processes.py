"""Runs train.py in processes of their own, as a user would."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from ml_collections import ConfigDict

from sparseformer_jax.config import to_json

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300


def start(
    config: ConfigDict, workdir: Path, *flags: str, num_devices: int = 1, **env: str
) -> subprocess.Popen:
    """Starts a training process whose output can be read line by line."""
    workdir.mkdir(parents=True, exist_ok=True)
    config_file = workdir.parent / f"{workdir.name}_config.py"
    config_file.write_text(
        "from sparseformer_jax.config import from_json\n"
        f"def get_config():\n    return from_json({to_json(config)!r})\n"
    )
    command = [sys.executable, "-W", "error", "train.py", f"--config={config_file}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Waits for the end of a run that must succeed and returns its output."""
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


def interrupt(process: subprocess.Popen, step: int, number: signal.Signals) -> str:
    """Sends a signal as soon as a step, or one after it, is printed; returns the output."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        printed = re.match(r"step (\d+)/", line)
        if printed and int(printed[1]) >= step:
            process.send_signal(number)
            return "".join(lines) + process.communicate(timeout=TIMEOUT)[0]
    raise AssertionError(f"step {step} was never printed:\n{''.join(lines)}")


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, from the JSON lines."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: (line["train/loss"], line["train/grad_norm"])
        for line in lines
        if "train/loss" in line
    }
