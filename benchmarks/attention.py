"""Times block-sparse attention beside what one would use without it.

    python benchmarks/attention.py              # the first table of docs/benchmarks.md
    python benchmarks/attention.py --memory     # the second
    python benchmarks/attention.py --lengths 1024 --heads 2 --repeats 3

Before anything is timed, every pattern is checked against the reference. Times are the
median of several rounds on random float32 data, after two to warm up; every round runs
all methods, so that a busy machine slows all of them alike.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.bench.timing import device, median_ms, table
from sparseformer_jax import registry
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig

try:
    import torch
except ImportError:
    torch = None

HEAD_DIM = 64
# Our methods, as the model calls them: MASFormer's block span, S2-Attention, no sparsity.
OPTIONS = {
    "masformer": {"span_size": 256},
    "s2": {"block_size": 64, "local_blocks": 4, "vert_stride": 16},
    "dense": {},
}
Arrays = tuple[jax.Array, ...]
Pass = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Result:
    """Milliseconds of one method at one size, or the bytes of its temporaries."""

    method: str
    length: int
    heads: int
    forward_ms: float | None = None
    both_ms: float | None = None
    temporary_mib: float | None = None


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse()
    check_against_reference(args.methods)
    sizes = list(zip(args.lengths, args.heads, strict=True))
    if args.memory:
        results = measure_memory(args.methods)
    else:
        results = measure_time(args.methods, sizes, args.repeats)
    print(device(), markdown(results), sep="\n\n")
    args.out.mkdir(parents=True, exist_ok=True)
    name = "attention_memory" if args.memory else "attention"
    rows = [dataclasses.asdict(result) for result in results]
    report = {"device": device(), "results": rows}
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1))
    plot(results, args.out / f"{name}.png")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = ["masformer", "s2", "dense", "jax.nn", "torch"]
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods,
        default=methods,
        help="what to measure (default: all; torch only where it is installed)",
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384], help="tokens T")
    parser.add_argument(
        "--heads", nargs="+", type=int, default=[8, 2], help="heads N of each length"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="show the memory of the compiled forward and backward pass for T = 1k, "
        "2k, ..., 16k with 2 heads, instead of times",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("benchmark_results"),
        help="folder for the JSON file and the figure (default: benchmark_results)",
    )
    args = parser.parse_args()
    if len(args.lengths) != len(args.heads):
        parser.error(
            f"--lengths has {len(args.lengths)} values, --heads {len(args.heads)}: "
            "give one number of heads for each length"
        )
    if torch is None and "torch" in args.methods:
        args.methods.remove("torch")
    return args


def data(length: int, heads: int) -> Arrays:
    """Returns random query, key, value and gradient of the output."""
    rng = np.random.default_rng(0)
    shape = (1, length, heads, HEAD_DIM)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))


def forward_of(
    method: str, length: int, heads: int, implementation: str | None = None
) -> Callable[..., jax.Array]:
    """Returns attention of query, key and value."""
    if method == "jax.nn":
        return functools.partial(jax.nn.dot_product_attention, is_causal=True)
    module = registry.method("attention", method)
    sizes = dict.fromkeys(("vocab_size", "num_layers", "embed_dim", "mlp_dim"), 1)
    config = ModelConfig(num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM, **sizes)
    options = module.Options(**OPTIONS[method], implementation=implementation)
    attention = module.Method(config, options, rngs=nnx.Rngs(0))
    shard = Shard(num_heads=heads)
    return lambda q, k, v: attention.attend(Inputs(q, k, v), shard).output


def both_of(forward: Callable[..., jax.Array]) -> Callable[..., Arrays]:
    """Returns output and gradients of query, key, value and the output's gradient."""

    def both(*arrays: jax.Array) -> Arrays:
        *inputs, d_out = arrays
        out, pull = jax.vjp(forward, *inputs)
        return out, *pull(d_out)

    return both


def check_against_reference(methods: Iterable[str]) -> None:
    """Stops when a pattern's output or gradient differs from the reference."""
    length, heads = 700, 2
    arrays = data(length, heads)
    for method in set(methods) & OPTIONS.keys():
        ours, truth = (
            jax.jit(both_of(forward_of(method, length, heads, name)))(*arrays)
            for name in (None, "reference")
        )
        for one, other in zip(ours, truth, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5, err_msg=method)


def measure_time(
    methods: Iterable[str], sizes: Iterable[tuple[int, int]], repeats: int
) -> list[Result]:
    """Returns the times of all methods at all sizes."""
    results = []
    for length, heads in sizes:
        passes = {}
        for method in methods:
            prepare = torch_passes if method == "torch" else jax_passes
            forward, both = prepare(method, length, heads)
            passes |= {(method, "forward"): forward, (method, "both"): both}
        median = median_ms(passes, repeats, f"T={length} N={heads}")
        for method in methods:
            times = median[method, "forward"], median[method, "both"]
            results.append(Result(method, length, heads, *times))
    return results


def jax_passes(method: str, length: int, heads: int) -> tuple[Pass, Pass]:
    """Returns the forward pass, and that with the backward pass."""
    arrays = data(length, heads)
    forward = forward_of(method, length, heads)
    runs = jax.jit(forward), jax.jit(both_of(forward))
    return repeat(runs[0], *arrays[:3]), repeat(runs[1], *arrays)


def torch_passes(method: str, length: int, heads: int) -> tuple[Pass, Pass]:
    """Returns the passes of PyTorch's dense causal attention."""
    del method
    *inputs, d_out = (
        torch.tensor(np.asarray(array)).transpose(1, 2).contiguous()
        for array in data(length, heads)
    )
    inputs = [array.requires_grad_() for array in inputs]
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = functools.partial(attention, *inputs, is_causal=True)
    return repeat(forward), repeat(lambda: torch.autograd.grad(forward(), inputs, d_out))


def repeat(function: Callable[..., object], *arguments: object) -> Pass:
    """Returns a function that calls another so many times and waits."""

    def run(times: int) -> None:
        for _ in range(times):
            jax.block_until_ready(function(*arguments))

    return run


def measure_memory(methods: Iterable[str]) -> list[Result]:
    """Returns what the compiler reserves beside inputs and outputs, for 2 heads."""
    heads = 2
    lengths = [2**power for power in range(10, 15)]
    jobs = [(method, n) for method in methods if method != "torch" for n in lengths]
    results = []
    for method, length in tqdm(jobs, unit="size"):
        array = jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.float32)
        both = jax.jit(both_of(forward_of(method, length, heads)))
        analysis = both.lower(*[array] * 4).compile().memory_analysis()
        mib = analysis.temp_size_in_bytes / 2**20
        results.append(Result(method, length, heads, temporary_mib=mib))
    return results


def markdown(results: list[Result]) -> str:
    """Returns a table: times with their ratios, or memory by length."""
    if results[0].temporary_mib is not None:
        lengths = sorted({result.length for result in results})
        mib = {(r.method, r.length): f"{r.temporary_mib:.0f}" for r in results}
        methods = dict.fromkeys(result.method for result in results)
        rows = [[m, *(mib[m, length] for length in lengths)] for m in methods]
        return table(["MiB", *(f"T={length}" for length in lengths)], rows)
    both = {(r.length, r.heads, r.method): r.both_ms for r in results}
    header = ["T", "N", "method", "forward ms", "forward + backward ms"]
    baselines = [name for name in ("jax.nn", "torch") if name in {k[2] for k in both}]
    rows = [
        [r.length, r.heads, r.method, f"{r.forward_ms:.0f}", f"{r.both_ms:.0f}"]
        + [f"{both[r.length, r.heads, name] / r.both_ms:.1f}x" for name in baselines]
        for r in results
    ]
    return table(header + [f"over {name}" for name in baselines], rows)


def plot(results: list[Result], path: pathlib.Path) -> None:
    """Draws time or memory against length, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    is_memory = results[0].temporary_mib is not None
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        # Times are of different numbers of heads: compare them per head.
        values = [r.temporary_mib if is_memory else r.both_ms / r.heads for r in own]
        axes.plot([r.length for r in own], values, "o-", label=method)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    label = "temporary memory in MiB" if is_memory else "ms per head"
    axes.set_ylabel(f"{label}, forward + backward")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
