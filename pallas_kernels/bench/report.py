"""Results as a table, JSON and a picture."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.timing import device, table

PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Result:
    """Times of one contender in one case.

    Attributes:
        case: the size.
        contender: its name.
        ms: milliseconds by pass.
        tflops: achieved on the pairs that the contender has to visit, by pass.
        over: speed-up over other contenders, by their name and pass.
        temporary_mib: memory of forward and backward, see `contenders.Prepared`.
        reason: why it was not timed.
    """

    case: Case
    contender: str
    ms: dict[str, float] = dataclasses.field(default_factory=dict)
    tflops: dict[str, float] = dataclasses.field(default_factory=dict)
    over: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    temporary_mib: float | None = None
    reason: str | None = None


def markdown(results: Sequence[Result]) -> str:
    """Returns one row for each case, contender and pass."""
    rivals = list(dict.fromkeys(name for result in results for name in result.over))
    header = ["T", "H", "density", "method", "pass", "ms", "TFLOP/s", "MiB"]
    rows = []
    for result in results:
        case = result.case
        mib = "" if result.temporary_mib is None else f"{result.temporary_mib:.0f}"
        for name, ms in result.ms.items():
            ratios = [result.over.get(rival, {}).get(name) for rival in rivals]
            rows.append(
                [case.length, case.head_dim, case.density, result.contender, name]
                + [f"{ms:.3g}", f"{result.tflops[name]:.3g}", mib]
                + ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
            )
    return table(header + [f"over {rival}" for rival in rivals], rows)


def save(results: Sequence[Result], command: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes bench.json and, where matplotlib is installed, bench.png; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    rows = [dataclasses.asdict(result) for result in results]
    report = {"device": device(), "command": command, "results": rows}
    path.write_text(json.dumps(report, indent=1))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [path]
    sizes = list(dict.fromkeys((r.case.length, r.case.head_dim) for r in results))
    figure = Figure(figsize=(4.5 * len(sizes), 7), layout="constrained")
    grid = figure.subplots(len(PASSES), len(sizes), squeeze=False)
    for column, (length, head_dim) in enumerate(sizes):
        own = [r for r in results if (r.case.length, r.case.head_dim) == (length, head_dim)]
        for axes, name in zip(grid[:, column], PASSES, strict=True):
            _draw(axes, own, name)
            axes.set_title(f"{name}, T={length}, H={head_dim}")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(folder / "bench.png", dpi=150)
    return [path, folder / "bench.png"]


def _draw(axes: Any, results: Sequence[Result], name: str) -> None:
    """Draws time against density; a dense method is a level line."""
    for number, contender in enumerate(dict.fromkeys(r.contender for r in results)):
        own = [r for r in results if r.contender == contender and name in r.ms]
        points = sorted((r.case.density, r.ms[name]) for r in own)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=contender)
    axes.set_xlim(0, 1.05)
    axes.set_yscale("log")
    axes.set_xlabel("density of blocks")
    axes.set_ylabel("ms")
