"""Times block-sparse attention beside dense attention and other sparse kernels.

    python -m pallas_kernels.bench
    python -m pallas_kernels.bench --lengths 32768 --densities 0.1 0.2 0.5 1 --head-dims 128

Every method gets the same random arrays and, if it can take one, the same random causal
block mask. A method is timed only after its output and gradients agreed with the
float32 reference in the same run. TFLOP/s count the pairs that a method has to visit:
those of the mask, or the whole causal triangle. MiB is what XLA reserves for forward and
backward beside inputs and outputs.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array
from tqdm import tqdm

from pallas_kernels.bench import contenders, truth
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.contenders import BASELINES, Contender, Prepared, Unavailable
from pallas_kernels.bench.report import PASSES, Result, markdown, save
from pallas_kernels.bench.timing import device, median_ms
from pallas_kernels.block_sparse_attention.selection import IMPLEMENTATIONS
from pallas_kernels.checks import check_integer

_OURS, _DENSE = "ours", " dense"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark that the command line asks for; returns the exit code."""
    # PyTorch wants some of the GPU's memory as well.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args = parse(arguments)
    results: list[Result] = []
    command = "python -m pallas_kernels.bench " + shlex.join(arguments or sys.argv[1:])
    print(device())
    for case in cases(args):
        results += measure(case, chosen(args), args.rounds)
        paths = save(results, command.strip(), args.out)
    print(markdown(results))
    for path in paths:
        print(f"wrote {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = functools.partial(parser.add_argument, nargs="+")
    add(
        "--lengths",
        type=int,
        default=[2048, 8192] if on_cpu else [8192, 32768],
        help="tokens T (default: %(default)s)",
    )
    add(
        "--densities",
        type=float,
        default=[0.1, 0.2, 0.5, 1.0],
        help="share of the causal blocks that is kept; 1 is dense (default: %(default)s)",
    )
    add(
        "--head-dims",
        type=int,
        default=[64] if on_cpu else [64, 128],
        help="head dimensions H (default: %(default)s)",
    )
    add(
        "--implementations",
        default=["auto"],
        choices=["auto", *IMPLEMENTATIONS.names],
        help="ours to time; auto picks the best (default: auto)",
    )
    add(
        "--baselines",
        default=list(BASELINES),
        choices=BASELINES,
        help="others to time, where they can run (default: all)",
    )
    default = 8 if on_cpu else 32
    parser.add_argument("--heads", type=int, default=default, help=f"N (default: {default})")
    parser.add_argument("--kv-heads", type=int, default=8, help="K (default: 8)")
    parser.add_argument("--block-size", type=int, default=64, help="tokens (default: 64)")
    dtype = "float32" if on_cpu else "bfloat16"
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default=dtype,
        help=f"of query, key and value (default: {dtype})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("benchmark_results"),
        help="folder for bench.json and bench.png (default: benchmark_results)",
    )
    args = parser.parse_args(arguments)
    try:
        cases(args)
        check_integer("rounds", args.rounds)
    except ValueError as error:
        parser.error(str(error))
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """Returns the sizes to measure."""
    return [
        Case(length, density, head_dim, args.heads, args.kv_heads, args.block_size, args.dtype)
        for head_dim in args.head_dims
        for length in args.lengths
        for density in args.densities
    ]


def chosen(args: argparse.Namespace) -> dict[str, Contender]:
    """Returns what to time, by name."""
    own = {
        f"{_OURS} ({name})": functools.partial(
            contenders.ours, implementation=None if name == "auto" else name
        )
        for name in args.implementations
    }
    return own | {name: BASELINES[name] for name in args.baselines}


def measure(case: Case, methods: dict[str, Contender], rounds: int) -> list[Result]:
    """Returns the times of the methods that can run the case and agree with the truth.

    The result of one that cannot, or does not, has the reason and no times.
    """
    dense = dataclasses.replace(case, density=1.0)
    jobs = {name: (method, case) for name, method in methods.items()}
    if case.density < 1:
        own = [name for name in methods if name.startswith(_OURS)]
        jobs |= {f"{name}{_DENSE}": (methods[name], dense) for name in own}
    label = f"T={case.length} H={case.head_dim} density={case.density}"
    prepared, results = {}, []
    for name, (method, size) in tqdm(jobs.items(), f"checking {label}", leave=False, disable=None):
        try:
            prepared[name] = _checked(name, method, size, dense)
        except Unavailable as reason:
            results.append(Result(case, name, reason=str(reason)))
        # Compilers, launches and libraries of others: none of them ends the benchmark.
        except Exception as error:
            results.append(Result(case, name, reason=_first_line(error)))
    passes = {
        (name, kind): run
        for name, (ready, _) in prepared.items()
        for kind, run in _passes(ready).items()
    }
    times = median_ms(passes, rounds, label)
    for result in results:
        tqdm.write(f"{label}: no {result.contender}: {result.reason}")
    return [_result(case, name, *own, times) for name, own in prepared.items()] + results


def _checked(name: str, method: Contender, case: Case, dense: Case) -> tuple[Prepared, Case]:
    """Returns the functions to time, each of which has run once, and whose pairs they visit."""
    ready = method(case, case.arrays())
    visited = case if ready.is_sparse else dense
    truth.check(visited, ready.results(), _truth(visited), of=name)
    for run in _passes(ready).values():
        run(1)
    return ready, visited


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _passes(ready: Prepared) -> dict[str, Callable[[int], object]]:
    runs = {kind: getattr(ready, kind) for kind in PASSES}
    return {kind: run for kind, run in runs.items() if run is not None}


@functools.lru_cache(maxsize=2)
def _truth(case: Case) -> tuple[Array, ...]:
    return truth.expected(case, case.arrays())


def _result(
    case: Case, name: str, ready: Prepared, visited: Case, times: dict[tuple[str, str], float]
) -> Result:
    ms = {kind: time for (own, kind), time in times.items() if own == name}
    flops = visited.flops()
    tflops = {kind: flops[kind] / time / 1e9 for kind, time in ms.items()}
    over: dict[str, dict[str, float]] = {}
    if name.startswith(_OURS) and not name.endswith(_DENSE):
        for (rival, kind), time in times.items():
            if not rival.startswith(_OURS) or rival == f"{name}{_DENSE}":
                rival = rival.removeprefix(f"{name} ")
                over.setdefault(rival, {})[kind] = time / ms[kind]
    return Result(case, name, ms, tflops, over, ready.temporary_mib())


if __name__ == "__main__":
    sys.exit(main())
