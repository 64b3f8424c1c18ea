"""Medians over rounds in which everything runs once, and how they are reported."""

import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import metadata
from typing import TypeVar

import jax
from tqdm import tqdm

_Name = TypeVar("_Name", bound=Hashable)

# A fast pass repeats until a round takes this long: the clock and the call then cost
# little beside it.
_SECONDS_PER_ROUND = 0.05


def median_ms(
    passes: Mapping[_Name, Callable[[int], object]], rounds: int, label: str
) -> dict[_Name, float]:
    """Returns the median time of each pass in milliseconds; takes what `samples_ms` does."""
    samples = samples_ms(passes, rounds, label)
    return {name: statistics.median(own) for name, own in samples.items()}


def samples_ms(
    passes: Mapping[_Name, Callable[[int], object]], rounds: int, label: str
) -> dict[_Name, list[float]]:
    """Returns the time of each pass in milliseconds, in every round.

    Every round runs all passes, so that whatever slows the machine slows all alike.

    Args:
        passes: functions that run something so many times and wait for its end.
        rounds: timed rounds, after two to compile and to warm up.
        label: of the progress bar.
    """
    repeats = dict.fromkeys(passes, 1)
    times: dict[_Name, list[float]] = {name: [] for name in passes}
    plan = [(turn, name) for turn in range(rounds + 2) for name in passes]
    for turn, name in tqdm(plan, desc=label, unit="run", leave=False, disable=None):
        start = time.perf_counter()
        passes[name](repeats[name])
        seconds = time.perf_counter() - start
        if turn == 1:
            repeats[name] = max(1, min(100, int(_SECONDS_PER_ROUND / seconds)))
        elif turn > 1:
            times[name].append(1e3 * seconds / repeats[name])
    return times


def repeated(function: Callable[..., object], *arguments: object) -> Callable[[int], None]:
    """Returns what launches a compiled function so many times and waits for the last."""

    def run(times: int) -> None:
        result = None
        for _ in range(times):
            result = function(*arguments)  # Results before it give their memory back.
        jax.block_until_ready(result)

    return run


def device() -> str:
    """Returns one line on hardware and versions."""
    cpu = pathlib.Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (cpu.read_text().splitlines() if cpu.exists() else ())
        if line.startswith("model name")
    ]
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    cores = f"{os.cpu_count()} cores {names[0] if names else platform.machine()}"
    return "; ".join([kinds, cores, f"Python {platform.python_version()}", *_versions()])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _versions() -> list[str]:
    names = ("jax", "jaxlib", "jax-triton", "triton", "torch")
    installed = {found.metadata["Name"] for found in metadata.distributions()}
    return [f"{name} {metadata.version(name)}" for name in names if name in installed]
