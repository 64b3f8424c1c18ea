"""What the trainer costs beside its compiled step, and what depth costs the compiler.

    python benchmarks/trainer.py --output=/tmp/trainer.json
    python benchmarks/trainer.py --torch

Overhead: steps per second of the quickstart through `train`, with its data, metrics, logs
and checkpoints, against the same compiled step called in a bare loop on one batch. Rounds
of both alternate; the medians over stretches of ten steps are compared.
Compile time: of one training step with 24 layers against 6, for every method.
With --torch instead: tokens per second of the bare step of every method and of the dense model's
twin in PyTorch, in turns; needs the extra "oracle".
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

from sparseformer_jax import config_flags, default_config, mesh, registry
from sparseformer_jax.describe import abstract_batch
from sparseformer_jax.training import loop
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, abstract_state, init_state
from sparseformer_jax.training.step import make_train_step

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.py")
STRETCH = 10


def main() -> None:
    """Runs both measurements, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of one round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each loop")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch alone")
    args = parser.parse_args()
    methods = registry.names("attention")
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    rows: list[dict[str, Any]] = []
    if args.torch:
        import torch

        versions["torch"] = torch.__version__
        rows = beside_torch(methods, args.steps, args.rounds)
        print_throughput(rows)
    else:
        for method in tqdm(methods, desc="methods"):
            config = config_flags.load(f"{QUICKSTART}:{method}")
            rows.append({"method": method} | overhead(config, args.steps, args.rounds))
            rows[-1] |= compile_ratio(config)
        print_tables(rows)
    if args.output:
        args.output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


def overhead(config: ConfigDict, steps: int, rounds: int) -> dict[str, float]:
    """Returns the steps per second of both loops, and train's fraction of the bare one."""
    config.train.num_steps = steps
    config.checkpoint.every = steps // 2
    config.eval.num_batches = 1
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        step, state, batch = compiled_step(config)
        bare, trained = [], []
        for _ in range(rounds):
            state, speeds = bare_speeds(step, state, batch, steps)
            bare += speeds
            trained += train_speeds(config)
    speeds = {"train": statistics.median(trained), "bare": statistics.median(bare)}
    return speeds | {"ratio": speeds["train"] / speeds["bare"]}


def bare_speeds(step: Any, state: Any, batch: Any, steps: int) -> tuple[Any, list[float]]:
    """Returns the state and the steps per second of each stretch."""
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    speeds = []
    for _ in range(steps // STRETCH):
        start = time.perf_counter()
        for _ in range(STRETCH):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        speeds.append(STRETCH / (time.perf_counter() - start))
    return state, speeds


def train_speeds(config: ConfigDict) -> list[float]:
    """Returns the steps per second of each stretch of a training run."""
    config.train.log_every = STRETCH
    with tempfile.TemporaryDirectory() as workdir:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loop.train(config, Path(workdir))
        lines = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
        return [
            line["train/tokens_per_second"] / line["train/tokens"]
            for line in lines
            if "train/tokens_per_second" in line
        ]


def beside_torch(methods: Sequence[str], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Returns the tokens per second of each method's bare step and of PyTorch's, dense.

    All train the default model on 8 rows of 512 tokens; the methods take turns.
    """
    configs = {method: _default_model(method) for method in methods}
    tokens = configs["dense"].train.batch_size * configs["dense"].data.seq_len
    speeds: dict[str, list[float]] = {"PyTorch, dense": [], **{name: [] for name in methods}}
    twin_step = _twin_step(configs["dense"])
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        programs = {name: compiled_step(config) for name, config in configs.items()}
        for _ in tqdm(range(rounds), desc="rounds"):
            speeds["PyTorch, dense"] += _stretches(twin_step, steps)
            for name, (step, state, batch) in programs.items():
                state, measured = bare_speeds(step, state, batch, steps)
                programs[name] = step, state, batch
                speeds[name] += measured
    medians = {name: tokens * statistics.median(values) for name, values in speeds.items()}
    dense = medians["PyTorch, dense"]
    return [{"method": n, "tokens": x, "ratio": x / dense} for n, x in medians.items()]


def _default_model(method: str) -> ConfigDict:
    """The default model, AdamW and the quickstart's options of a method."""
    config = default_config.get_config()
    config.attention = config_flags.load(f"{QUICKSTART}:{method}").attention
    config.data.seq_len, config.train.batch_size = 512, 8
    return config


def _twin_step(config: ConfigDict) -> Callable[[], Any]:
    """A step of PyTorch's twin on a batch of ones."""
    import torch
    import torch_twin

    schedule = make_schedule(config.optimizer, config.train.num_steps)
    model = torch_twin.Twin(config.model)
    step = torch_twin.Step(model, config.optimizer, map(float, map(schedule, itertools.count())))
    ones = torch.ones(config.train.batch_size, config.data.seq_len, dtype=torch.int64)
    return functools.partial(step, ones, ones)


def _stretches(step: Callable[[], Any], steps: int) -> list[float]:
    """The steps per second of each stretch of a step that waits for its result."""
    step()
    speeds = []
    for _ in range(steps // STRETCH):
        start = time.perf_counter()
        for _ in range(STRETCH):
            step()
        speeds.append(STRETCH / (time.perf_counter() - start))
    return speeds


def compile_ratio(config: ConfigDict) -> dict[str, float]:
    """Returns the seconds to compile a step with 6 and 24 layers: the best of three each."""
    seconds = {}
    for num_layers in (6, 24):
        config.model.num_layers = num_layers
        times = []
        for _ in range(3):
            jax.clear_caches()
            start = time.perf_counter()
            with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
                compiled_step(config, run_init=False)
            times.append(time.perf_counter() - start)
        seconds[f"compile_{num_layers}"] = min(times)
    return seconds | {"compile_ratio": seconds["compile_24"] / seconds["compile_6"]}


def compiled_step(config: ConfigDict, *, run_init: bool = True) -> tuple[Any, Any, Any]:
    """Returns the compiled training step, with a state and a batch of zeros to call it on."""
    model_def = ModelDef(config)
    trainable = {name: model_def.params[name] for name in model_def.trainable()}
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, trainable)
    schedule = make_schedule(config.optimizer, config.train.num_steps)
    device_mesh = jax.sharding.get_mesh()
    abstract = abstract_state(model_def, optimizer, device_mesh)
    batch = abstract_batch(config, device_mesh)
    step = jax.jit(make_train_step(model_def, optimizer, schedule), donate_argnums=0)
    compiled = step.lower(abstract, batch).compile()
    if not run_init:
        return compiled, None, None
    state = jax.jit(lambda: init_state(model_def, optimizer, jax.random.key(0)))()
    ones = {n: jnp.ones(b.shape, b.dtype, device=b.sharding) for n, b in batch.items()}
    return compiled, state, ones


def print_throughput(rows: list[dict[str, Any]]) -> None:
    """Prints the rows beside PyTorch's as a Markdown table."""
    print("| step | tokens/s | of PyTorch's |\n|---|---|---|")
    for row in rows:
        print("| {method} | {tokens:,.0f} | {ratio:.2f} |".format(**row))


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as two Markdown tables."""
    print("| method | train (steps/s) | bare step (steps/s) | ratio |\n|---|---|---|---|")
    for row in rows:
        print("| {method} | {train:.2f} | {bare:.2f} | {ratio:.3f} |".format(**row))
    print("\n| method | 6 layers (s) | 24 layers (s) | ratio |\n|---|---|---|---|")
    for row in rows:
        line = "| {method} | {compile_6:.2f} | {compile_24:.2f} | {compile_ratio:.2f} |"
        print(line.format(**row))


if __name__ == "__main__":
    main()
