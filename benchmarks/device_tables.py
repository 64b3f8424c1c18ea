"""Turns the results of `device.py` into the tables of docs/benchmarks.md.

python benchmarks/device_tables.py DIR/results.json
"""

import json
import pathlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables of a file; returns the exit code."""
    names = sys.argv[1:] if arguments is None else arguments
    if len(names) != 1:
        print("usage: python benchmarks/device_tables.py DIR/results.json", file=sys.stderr)
        return 2
    print(document(json.loads(pathlib.Path(names[0]).read_text(encoding="utf-8"))))
    return 0


def document(results: dict[str, Any]) -> str:
    """Returns all tables that there are rows for, with the device and the versions."""
    rows: list[Row] = results["rows"]
    ceilings = {row["name"]: row["tera_per_second"] for row in _kind(rows, "ceiling")}
    parts = [f"    {results['command']}"]
    for row in _kind(rows, "device"):
        card = f" ({row['card']})" if row["card"] else ""
        parts.append(f"{row['device']}{card}, {results['date']}.")
    if ceilings:
        parts.append(
            f"Ceilings: {ceilings['product']:.3g} TFLOP/s in a product of bfloat16 matrices, "
            f"{ceilings['copy']:.3g} TB/s read and written."
        )
    sections: dict[str, Callable[[], list[list[str]]]] = {
        "Attention": lambda: attention(rows, ceilings.get("product")),
        "Building lists": lambda: lists(rows),
        "Against float32 on the device": lambda: checks(rows),
        "float32 against float64": lambda: float32(rows),
        "autotune": lambda: plans(rows),
        "Training steps": lambda: training(rows, ceilings.get("product")),
        "pytest -m device": lambda: tests(rows),
        "What did not run": lambda: missing(results),
    }
    for title, make in sections.items():
        header, *body = make()
        if body:
            parts += [f"#### {title}", _table(header, body)]
    return "\n\n".join(parts)


def attention(rows: list[Row], ceiling: float | None) -> list[list[str]]:
    """Returns times by block size, density and pass, beside cuDNN dense and FlexAttention."""
    timed = _kind(rows, "time")
    ms = {(_block(row), _density(row), row["pass"], row["contender"]): row["ms"] for row in timed}
    cudnn = {row["pass"]: row["ms"] for row in timed if row["contender"] == "cudnn"}
    header = ["block", "density", "pass", "method", "ms", "min to max", "TFLOP/s", "of ceiling"]
    lines = [[*header, "over cuDNN dense", "over FlexAttention"]]
    for row in sorted(
        timed, key=lambda row: (_block(row), -_density(row), row["pass"] != "forward")
    ):
        flex = ms.get((_block(row), _density(row), row["pass"], "flex"))
        lines.append(
            [
                str(_block(row)),
                f"{_density(row):g}",
                row["pass"],
                row["contender"] + ("" if row.get("is_checked", True) else " (not checked)"),
                f"{row['ms']:.3g}",
                f"{row['ms_min']:.3g} to {row['ms_max']:.3g}",
                f"{row['tflops']:.3g}",
                _share(row["tflops"], ceiling),
                _ratio(cudnn.get(row["pass"]), row["ms"]),
                _ratio(flex, row["ms"]),
            ]
        )
    return lines


def lists(rows: list[Row]) -> list[list[str]]:
    """Returns what it takes to build lists, and attention with lists of either origin."""
    return [["block", "density", "what", "implementation", "ms"]] + [
        [
            str(_block(row)),
            f"{_density(row):g}",
            row["name"],
            row["implementation"],
            f"{row['ms']:.3g}",
        ]
        for row in _kind(rows, "lists")
    ]


def checks(rows: list[Row]) -> list[list[str]]:
    """Returns the largest errors of the kernels."""
    lines = [["operation", "method", "T", "H", "largest error", "allowed", "same bits again"]]
    for row in _kind(rows, "check"):
        case = row["case"]
        bits = row.get("same_bits_again")
        lines.append(
            [
                row.get("operation", f"attention, blocks of {_block(row)}, {_density(row):g}"),
                row.get("implementation", row.get("contender", "")),
                str(case["length"]),
                str(case["head_dim"]),
                f"{max(row['errors'].values()):.1e}" + ("" if row["passed"] else " (WRONG)"),
                f"{row['tolerance']:.0e}",
                "" if bits is None else "yes" if bits else "no",
            ]
        )
    return lines


def float32(rows: list[Row]) -> list[list[str]]:
    """Returns errors of float32 by length."""
    own = _kind(rows, "float32")
    names = list(own[0]["errors"]) if own else []
    return [["method", "T", *names]] + [
        [row["implementation"], str(row["case"]["length"])]
        + [f"{row['errors'][name]:.1e}" for name in names]
        for row in own
    ]


def plans(rows: list[Row]) -> list[list[str]]:
    """Returns the plans that autotune measured."""
    lines = [["method", "block", "density", "plan", "forward + backward ms"]]
    for row in _kind(rows, "plan"):
        marks = [name for name in ("default", "fastest") if row[f"is_{name}"]]
        took = row["failure"] if row["ms"] is None else f"{row['ms']:.3g}"
        mark = f" ({', '.join(marks)})" if marks else ""
        own = [row["implementation"], str(_block(row)), f"{_density(row):g}"]
        lines.append([*own, row["plan"], took + mark])
    return lines


def training(rows: list[Row], ceiling: float | None) -> list[list[str]]:
    """Returns the speed of training steps."""
    lines = [["config", "tokens", "ms", "tokens/s", "TFLOP/s", "of ceiling"]]
    for row in _kind(rows, "training"):
        lines.append(
            [
                row["config"],
                str(row["tokens"]),
                f"{row['ms']:.4g}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tflops']:.3g}",
                _share(row["tflops"], ceiling),
            ]
        )
    return lines


def tests(rows: list[Row]) -> list[list[str]]:
    """Returns how many tests ended how, and the names of those that failed."""
    lines = [["step", "passed", "skipped", "failed"]]
    own = _kind(rows, "test")
    for step in dict.fromkeys(row["step"] for row in own):
        outcomes = Counter(row["outcome"] for row in own if row["step"] == step)
        bad = [
            row["test"]
            for row in own
            if row["step"] == step
            if row["outcome"] in ("failed", "error")
        ]
        names = ": " + ", ".join(name.split("::")[-1] for name in bad) if bad else ""
        lines.append(
            [step, str(outcomes["passed"]), str(outcomes["skipped"]), f"{len(bad)}{names}"]
        )
    return lines


def missing(results: dict[str, Any]) -> list[list[str]]:
    """Returns the steps that did not end well, and what could not run."""
    lines = [["step", "why"]]
    for name, step in results["steps"].items():
        if step["status"] != "ok":
            lines.append([name, f"{step['status']}: {step.get('error', '')}".rstrip(": ")])
    for row in _kind(results["rows"], "unavailable"):
        lines.append([row["step"], row["reason"]])
    return lines


def _kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _block(row: Row) -> int:
    block: int = row["case"]["block_size"]
    return block


def _density(row: Row) -> float:
    density: float = row["case"]["density"]
    return density


def _share(tflops: float, ceiling: float | None) -> str:
    return "" if ceiling is None else f"{100 * tflops / ceiling:.0f} %"


def _ratio(rival: float | None, own: float) -> str:
    return "" if rival is None else f"{rival / own:.2f}x"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


if __name__ == "__main__":
    sys.exit(main())
