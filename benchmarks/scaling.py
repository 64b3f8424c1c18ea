"""Times routing and Combiner against the length of the sequence, beside dense attention.

    python benchmarks/scaling.py                    # two tables, exponents fitted
    python benchmarks/scaling.py --torch            # with PyTorch's attention, and a third table
    python benchmarks/scaling.py --output=scaling.json --picture=docs/scaling.png

Forward and backward in float32, for a batch of 1 and heads of 64; clusters and spans of about
sqrt(T) tokens. The third table is one whole layer, projections included, beside that of the
PyTorch port of the Routing Transformer. It wants PyTorch, the extra "oracle", and the port in a
folder of its own on PYTHONPATH:

    pip install --no-deps --target=DIR routing_transformer==1.6.1 local-attention==1.4.4 \\
        product-key-memory==0.1.10 mixture-of-experts==0.2.3

Every round runs all methods of a length once, so that a busy machine slows all of them alike. A
time is the median of the rounds after one to warm up; what takes more than five seconds runs once.
About six minutes on two cores.

glibc is told to keep the memory that programs give back: left to itself it returns large pieces to
Linux, which clears every page once more in the next run, and at 16k tokens that takes up to half
of the time of all methods but the dense ones.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scaling_passes
from scaling_passes import Pass
from tqdm import tqdm

from pallas_kernels.bench.timing import device, table

# A quick pass is repeated for so long in each round; a slow one is not run again.
SECONDS_PER_ROUND = 0.1
SLOW_SECONDS = 5

Row = dict[str, Any]


class Sample(NamedTuple):
    """Milliseconds of one pass: by the clock, and of all cores together."""

    wall: float
    cpu: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, writes the JSON and the picture."""
    args = parse(arguments)
    keep_memory()
    rows = attention(args.methods, args.lengths, args.heads, args.rounds)
    document = [device(), time_table(rows), memory_table(rows)]
    report = {"device": device(), "attention": rows}
    if args.torch:
        layers = layer(args.layer_lengths, args.rounds)
        document.append(layer_table(layers))
        report["layer"] = layers
    print(*document, sep="\n\n")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        draw(rows, args.picture)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in scaling_passes.ATTENTION if name != "torch"]
    lengths = [2**power for power in range(10, 15)]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help="tokens T")
    parser.add_argument("--heads", type=int, default=2, help="heads N (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--torch", action="store_true", help="time PyTorch's attention and layer")
    parser.add_argument(
        "--layer-lengths", nargs="+", type=int, default=lengths[:-1], help="T of the third table"
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of all samples")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG of time and memory by length")
    args = parser.parse_args(arguments)
    missing = scaling_passes.missing() if args.torch else None
    if missing:
        parser.error(f"--torch: {missing} is not installed; see --help")
    if args.torch:
        args.methods.append("torch")
    return args


def keep_memory() -> None:
    """Makes malloc keep what is freed; other C libraries than glibc are left as they are."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    for option, value in ((trim_threshold, 2**31 - 1), (mmap_max, 0), (arena_max, 1)):
        if not libc.mallopt(option, value):
            raise OSError(f"mallopt({option}, {value}) failed")


def attention(methods: Sequence[str], lengths: Sequence[int], heads: int, rounds: int) -> list[Row]:
    """Returns what methods take at each length: samples, and MiB of temporaries and results."""
    rows = []
    for length in lengths:
        passes = {}
        for name in tqdm(methods, f"compile T={length}", leave=False, disable=None):
            passes[name] = scaling_passes.ATTENTION[name](length, heads)
        found = samples(passes, rounds, f"T={length}")
        rows += [
            {"method": name, "T": length, "MiB": passes[name].mib, **_summary(found[name])}
            for name in methods
        ]
    return rows


def layer(lengths: Sequence[int], rounds: int) -> list[Row]:
    """Returns what a layer takes at each length: the port's, and ours by both selections."""
    rows = []
    for length in lengths:
        passes = {name: make(length) for name, make in scaling_passes.LAYER.items()}
        found = samples(passes, 2 * rounds, f"layer T={length}")
        rows += [{"method": name, "T": length, **_summary(found[name])} for name in passes]
    return rows


def samples(passes: Mapping[str, Pass], rounds: int, label: str) -> dict[str, list[Sample]]:
    """Returns the samples of each pass, in rounds of one each; those of the first only if slow."""
    repeats = dict.fromkeys(passes, 1)
    found: dict[str, list[Sample]] = {name: [] for name in passes}
    plan = [(turn, name) for turn in range(rounds + 1) for name in passes]
    for turn, name in tqdm(plan, label, unit="run", leave=False, disable=None):
        if repeats[name] == 0:
            continue
        wall, cpu = timed(passes[name].run, repeats[name])
        if turn == 0 and wall > SLOW_SECONDS:
            repeats[name] = 0
            give_back()
        elif turn == 0:
            repeats[name] = max(1, int(SECONDS_PER_ROUND / wall))
            continue
        found[name].append(Sample(1e3 * wall, 1e3 * cpu))
    return found


def give_back() -> None:
    """Returns free memory to the system: gigabytes of scores need not wait for another turn."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Returns the seconds of one run, by the clock and of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Returns e of the least-squares fit c T^e, in logarithms."""
    slope, _ = np.polyfit(np.log(lengths), np.log(values), 1)
    return float(slope)


def time_table(rows: list[Row]) -> str:
    """Returns times by length, their exponents, and ratios at the longest."""
    times = {(row["method"], row["T"]): row["ms"] for row in rows}
    lengths = sorted({row["T"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    baselines = [name for name in ("jax.nn", "torch") if name in methods]
    header = [
        "forward + backward, ms",
        *(f"T={length}" for length in lengths),
        *_exponents(lengths),
    ]
    body = []
    for name in methods:
        own = [times[name, length] for length in lengths]
        faster = [times[base, lengths[-1]] / own[-1] for base in baselines]
        body.append(
            [name, *map(_number, own), *_fits(lengths, own), *(f"{x:.1f}x" for x in faster)]
        )
    return table([*header, *(f"over {name}" for name in baselines)], body)


def memory_table(rows: list[Row]) -> str:
    """Returns MiB by length, of the methods that XLA compiles, and their exponents."""
    lengths = sorted({row["T"] for row in rows})
    mib = {(row["method"], row["T"]): row["MiB"] for row in rows if row["MiB"]}
    body = []
    for name in dict.fromkeys(method for method, _ in mib):
        own = [mib[name, length] for length in lengths]
        body.append([name, *map(_number, own), *_fits(lengths, own)])
    return table(["MiB", *(f"T={length}" for length in lengths), *_exponents(lengths)], body)


def layer_table(rows: list[Row]) -> str:
    """Returns the layers' times by length and how much faster than the port ours are."""
    port, *names = dict.fromkeys(row["method"] for row in rows)
    found = {(row["method"], row["T"]): row for row in rows}
    header = ["T", f"{port}, ms"]
    for name in names:
        header += [f"{name}, ms", "faster", "by minima"]
    body = []
    for length in sorted({row["T"] for row in rows}):
        theirs = found[port, length]
        line = [length, _number(theirs["ms"])]
        for name in names:
            own = found[name, length]
            least = min(theirs["wall"]) / min(own["wall"])
            line += [_number(own["ms"]), f"{theirs['ms'] / own['ms']:.2f}x", f"{least:.2f}x"]
        body.append(line)
    return table(header, body)


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Writes a picture of time and memory against length, both axes logarithmic."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    labels = {"ms": "milliseconds, forward + backward", "MiB": "MiB of temporaries and results"}
    for axes, (quantity, label) in zip(panels, labels.items(), strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name and row[quantity]]
            style = "o--" if name in scaling_passes.DENSE else "o-"
            axes.plot([row["T"] for row in own], [row[quantity] for row in own], style, label=name)
        lengths = sorted({row["T"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, map(str, lengths))
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _summary(found: Sequence[Sample]) -> Row:
    wall, cpu = zip(*found, strict=True)
    return {"ms": statistics.median(wall), "wall": wall, "cpu": cpu}


def _exponents(lengths: Sequence[int]) -> list[str]:
    return ["exponent", "of the last three"] if len(lengths) > 3 else ["exponent"]


def _fits(lengths: Sequence[int], values: Sequence[float]) -> list[str]:
    """The exponents over all lengths and over the last three."""
    fits = [exponent(lengths, values)]
    if len(lengths) > 3:
        fits.append(exponent(lengths[-3:], values[-3:]))
    return [f"{fit:.2f}" for fit in fits]


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


if __name__ == "__main__":
    main()
