"""The steps of `device.py`: each call is a process that does one of them.

It writes lines of JSON to what was its standard output: the state that it enters, rows of
results, and the error that ended it. A line that it reads gives it its turn on the GPU.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockMask, autotune, block_max_attention, block_sparse_attention
from pallas_kernels.bench import contenders, timing, truth
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.contenders import Prepared, Unavailable
from pallas_kernels.block_sparse_attention.tuner import describe
from pallas_kernels.selection import CannotRun

ROOT = pathlib.Path(__file__).parents[1]
_NAMES = ("out", "d_query", "d_key", "d_value")
# For what is compared and not timed: XLA would try out every product, for minutes.
_UNTUNED: Any = {"xla_gpu_autotune_level": 0}


class Parent:
    """The process that gives turns and keeps results."""

    def __init__(self, messages: IO[str], answers: IO[str], out: pathlib.Path) -> None:
        self._messages = messages
        self._answers = answers
        self.out = out

    def send(self, **message: Any) -> None:
        """Sends a message."""
        print(json.dumps(message), file=self._messages, flush=True)

    def row(self, **values: Any) -> None:
        """Adds a row to the results."""
        self.send(row=values)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits until no other step is on the GPU, and keeps it until the block ends."""
        self.send(state="waiting")
        if not self._answers.readline():
            raise SystemExit("the parent is gone")
        yield
        self.send(state="compiling")


def main(job: dict[str, Any]) -> int:
    """Runs the step of a job; returns the exit code."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    parent = Parent(messages, sys.stdin, pathlib.Path(job["out"]))
    try:
        globals()[job["function"]](parent, **job["arguments"])
    except (Unavailable, CannotRun) as reason:
        parent.row(kind="unavailable", reason=str(reason), **job["arguments"])
    # Whatever a compiler, a launch or a library of others complains of.
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        parent.send(error=": ".join([type(error).__name__, *first])[:500])
        raise
    return 0


def machine(parent: Parent, matrix: int, copied: int, rounds: int) -> None:
    """Names the device, and measures what a product and a copy reach on it."""
    parent.row(kind="device", device=timing.device(), card=_card())
    keys = jax.random.split(jax.random.key(0), 2)
    factors = [jax.random.normal(key, (matrix, matrix), jnp.bfloat16) for key in keys]
    product = jax.jit(jnp.matmul).lower(*factors).compile()
    # One number more in every place: a plain copy would be left out.
    source = jnp.arange(copied, dtype=jnp.int32)
    copy = jax.jit(lambda x: x + 1).lower(source).compile()
    with parent.turn():
        passes = {
            "product": timing.repeated(product, *factors),
            "copy": timing.repeated(copy, source),
        }
        ms = timing.samples_ms(passes, rounds, "ceilings")
    work = {"product": 2 * matrix**3, "copy": 8 * copied}
    for name, samples in ms.items():
        rate = work[name] / statistics.median(samples) / 1e9
        parent.row(kind="ceiling", name=name, tera_per_second=rate, **_spread(samples))


def check_attention(parent: Parent, implementation: str, case: dict[str, Any]) -> None:
    """Compares all heads of a kernel, forward and backward, with float32 on the device."""
    size = Case(**case)
    *inputs, d_out = size.arrays()

    wide = [array.astype(jnp.float32) for array in (*inputs, d_out)]
    run = _both(size, implementation).lower(*inputs, d_out).compile(_UNTUNED)
    reference = _both(size, "reference").lower(*wide).compile(_UNTUNED)
    with parent.turn():
        actual, expected = run(*inputs, d_out), reference(*wide)
        errors = dict(zip(_NAMES, map(_distance, actual, expected), strict=True))
        again = run(*inputs, d_out)
        same = all(map(np.array_equal, map(_bits, actual), map(_bits, again)))
    tolerance = 0.01
    parent.row(
        kind="check",
        operation="attention",
        implementation=implementation,
        case=case,
        errors=errors,
        tolerance=tolerance,
        same_bits_again=same,
        passed=all(error <= tolerance for error in errors.values()),
    )


def _both(case: Case, implementation: str) -> Any:
    """Returns the function of query, key, value and dO under `jax.jit`: out, dQ, dK and dV."""
    block_mask = case.block_mask()

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return block_sparse_attention(
            query, key, value, block_mask, is_causal=True, implementation=implementation
        )

    @jax.jit
    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        *inputs, d_out = arrays
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(d_out)

    return both


def check_block_max(parent: Parent, implementation: str, case: dict[str, Any]) -> None:
    """Compares the maxima of a kernel with those of float32 on the device."""
    size = Case(**case)
    query, key, value, _ = size.arrays()
    wide = [array.astype(jnp.float32) for array in (query, key, value)]

    @jax.jit
    def log_sum_exp(*arrays: jax.Array) -> jax.Array:
        mask = size.block_mask()
        return block_sparse_attention(
            *arrays, mask, is_causal=True, implementation="reference", return_lse=True
        )[1]

    @functools.partial(jax.jit, static_argnums=0)
    def maxima(name: str, query: jax.Array, key: jax.Array, lse: jax.Array) -> jax.Array:
        blocks = {"query_block_size": size.block_size, "key_block_size": size.block_size}
        return block_max_attention(query, key, lse, is_causal=True, implementation=name, **blocks)

    shape = jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
    run = maxima.lower(implementation, query, key, shape).compile(_UNTUNED)
    reference = maxima.lower("reference", *wide[:2], shape).compile(_UNTUNED)
    statistics_of = log_sum_exp.lower(*wide).compile(_UNTUNED)
    with parent.turn():
        lse = statistics_of(*wide)
        error = _distance(run(query, key, lse), reference(*wide[:2], lse))
    tolerance = 0.01
    parent.row(
        kind="check",
        operation="block_max",
        implementation=implementation,
        case=case,
        errors={"out": error},
        tolerance=tolerance,
        passed=error <= tolerance,
    )


def truths(parent: Parent, case: dict[str, Any]) -> None:
    """Computes what the contenders of a case are compared with, once."""
    size = Case(**case)
    group = truth.first_group(size, size.arrays())
    # Trying out products would disturb what others time.
    program = truth.program(size).lower(*group).compile(_UNTUNED)
    with parent.turn():
        np.savez(_truth_file(size), *map(np.asarray, program(*group)))


def timed(parent: Parent, contender: str, case: dict[str, Any], rounds: int) -> None:
    """Times forward and backward of a contender, after comparing them with the truth."""
    size = Case(**case)
    method = contenders.BASELINES.get(contender)
    if method is None:
        method = functools.partial(contenders.ours, implementation=contender)
    ready = method(size, size.arrays())
    with parent.turn():
        _time(parent, contender, size, ready, rounds)


def _time(parent: Parent, contender: str, case: Case, ready: Prepared, rounds: int) -> None:
    row = {"kind": "time", "contender": contender, "case": vars_of(case)}
    row["is_checked"] = _truth_file(case).exists()
    if row["is_checked"] and not _agrees(parent, contender, case, ready):
        return
    for name in ("forward", "backward"):
        run = getattr(ready, name)
        if run is None:
            continue
        samples = timing.samples_ms({name: run}, rounds, contender)[name]
        tflops = case.flops()[name] / statistics.median(samples) / 1e9
        parent.row(**row, **{"pass": name}, tflops=tflops, **_spread(samples))


def _agrees(parent: Parent, contender: str, case: Case, ready: Prepared) -> bool:
    """Compares with the truth, and reports it."""
    with np.load(_truth_file(case)) as stored:
        expected = tuple(jnp.asarray(stored[name]) for name in stored.files)
    errors = truth.errors(case, ready.results(), expected)
    tolerance = truth.tolerance(case)
    passed = all(error <= tolerance for error in errors.values())
    parent.row(
        kind="check",
        contender=contender,
        case=vars_of(case),
        errors=errors,
        tolerance=tolerance,
        passed=passed,
    )
    return passed


def lists(parent: Parent, implementation: str, case: dict[str, Any]) -> None:
    """Times the building of lists, on the host and on the device, and attention with each."""
    size = Case(**case)
    sizes = (size.length, size.length, size.block_size, size.block_size)
    build = functools.partial(BlockMask.from_block_map, is_causal=True)
    block_map = jnp.asarray(size.block_map)

    @jax.jit
    def build_there(block_map: jax.Array) -> BlockMask:
        return build(block_map, *sizes)

    *inputs, _ = size.arrays()

    def attend(block_mask: BlockMask, *inputs: jax.Array) -> jax.Array:
        return block_sparse_attention(
            *inputs, block_mask, is_causal=True, implementation=implementation
        )

    there = build_there.lower(block_map).compile()
    traced = jax.jit(attend).lower(jax.eval_shape(build_there, block_map), *inputs).compile()
    constant = jax.jit(functools.partial(attend, size.block_mask())).lower(*inputs).compile()
    with parent.turn():
        block_mask = there(block_map)
        passes = {
            "lists on the host": timing.repeated(build, size.block_map, *sizes),
            "lists in jit": timing.repeated(there, block_map),
            "forward, lists cut in jit": timing.repeated(traced, block_mask, *inputs),
            "forward, lists cut before": timing.repeated(constant, *inputs),
        }
        ms = timing.samples_ms(passes, 5, "lists")
    for name, samples in ms.items():
        parent.row(
            kind="lists", name=name, implementation=implementation, case=case, **_spread(samples)
        )


def tests(parent: Parent, name: str, options: list[str]) -> None:
    """Runs pytest; a row for each test that ended, as soon as it has."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options]
    # "TEST PASSED" from one process, "[gw0] PASSED TEST" from several; the summary at the
    # end, which names failed ones once more, begins with the outcome.
    ended = re.compile(
        r"^(?:\[gw.*(?P<outcome>PASSED|FAILED|ERROR|SKIPPED) )?(?P<test>tests/\S+::\S+)"
    )
    single = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED)\b")
    with parent.turn(), (parent.out / f"{name}.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            if found := ended.match(line):
                alone = single.search(line)
                outcome = found["outcome"] or (alone[1] if alone else None)
                if outcome:
                    parent.row(kind="test", test=found["test"], outcome=outcome.lower())
        if process.wait():
            raise RuntimeError(f"pytest ended with {process.returncode}: see {name}.txt")


def autotuned(parent: Parent, implementation: str, case: dict[str, Any]) -> None:
    """Times the plans of a kernel."""
    size = Case(**case)
    *inputs, _ = size.arrays()
    mask = size.block_mask()
    with parent.turn():
        reports = autotune(*inputs, mask, is_causal=True, implementation=implementation)
    for report in reports:
        for number, plan in enumerate(report.plans):
            parent.row(
                kind="plan",
                implementation=implementation,
                case=case,
                plan=describe(plan),
                is_default=number == 0,
                is_fastest=plan == report.fastest,
                ms=report.ms.get(number),
                failure=report.failures.get(number),
            )


def errors(parent: Parent, implementation: str, case: dict[str, Any]) -> None:
    """Measures the errors of float32 against float64 on the device."""
    size = Case(**case)
    arrays = size.arrays()
    group = truth.first_group(size, arrays)
    run = _both(size, implementation).lower(*arrays).compile(_UNTUNED)
    with jax.enable_x64(True):
        program = truth.program(size, jnp.float64).lower(*group).compile(_UNTUNED)
        with parent.turn():
            found = truth.errors(size, run(*arrays), program(*group))
    parent.row(kind="float32", implementation=implementation, case=case, errors=found)


def training(parent: Parent, config: str, steps: int) -> None:
    """Times bare training steps of a config, with one piece of its batch."""
    try:
        from sparseformer_jax import config_flags, describe, mesh
        from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
        from sparseformer_jax.training.state import ModelDef, init_state
        from sparseformer_jax.training.step import make_train_step
    except ImportError as error:
        raise Unavailable(f"needs {error.name}") from error
    settings = config_flags.load(str(ROOT / "configs" / config))
    settings.train.batch_size //= settings.train.accumulation_steps
    settings.train.accumulation_steps = 1
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(settings)
        trainable = {name: model_def.params[name] for name in model_def.trainable()}
        optimizer = make_optimizer(settings.optimizer, settings.train.num_steps, trainable)
        schedule = make_schedule(settings.optimizer, settings.train.num_steps)
        state = jax.jit(lambda: init_state(model_def, optimizer, jax.random.key(0)))()
        batch = _random_batch(settings)
        step = jax.jit(make_train_step(model_def, optimizer, schedule), donate_argnums=0)
        with parent.turn():
            # XLA times its choices for products while it compiles.
            compiled = step.lower(state, batch).compile()
            state, metrics = compiled(state, batch)
            losses, samples = [float(metrics["loss"])], []
            for _ in range(steps):
                start = time.perf_counter()
                state, metrics = compiled(state, batch)
                losses.append(float(metrics["loss"]))
                samples.append(1e3 * (time.perf_counter() - start))
        cost = describe.costs(settings, model_def)
    tokens = settings.train.batch_size * settings.data.seq_len
    per_second = 1e3 * tokens / statistics.median(samples)
    memory: Any = compiled.memory_analysis()
    parent.row(
        kind="training",
        config=config,
        tokens=tokens,
        tokens_per_second=per_second,
        tflops=cost.training_flops * per_second / 1e12,
        losses=losses,
        temporary_mib=memory.temp_size_in_bytes / 2**20,
        passed=bool(np.isfinite(losses).all()),
        **_spread(samples),
    )


def _random_batch(config: Any) -> dict[str, jax.Array]:
    shape = (1, config.train.batch_size, config.data.seq_len)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)
    arrays = {
        "inputs": tokens,
        "targets": jnp.roll(tokens, -1, -1),
        "positions": jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "weights": jnp.ones(shape, jnp.float32),
    }
    from sparseformer_jax import describe

    shapes = describe.abstract_batch(config, jax.sharding.get_mesh())
    return {name: jax.device_put(arrays[name], shapes[name].sharding) for name in shapes}


def vars_of(case: Case) -> dict[str, Any]:
    """Returns the fields of a case."""
    return {name: getattr(case, name) for name in case.__dataclass_fields__}


def _truth_file(case: Case) -> pathlib.Path:
    return pathlib.Path(os.environ["DEVICE_SCRATCH"]) / (
        f"truth_{case.length}_{case.block_size}_{case.density}.npz"
    )


def _spread(samples: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}


def _distance(one: jax.Array, other: jax.Array) -> float:
    """Returns ||one - other|| / ||other||."""
    difference = jnp.linalg.norm((one.astype(jnp.float32) - other).ravel())
    return float(difference / jnp.linalg.norm(other.ravel()))


def _bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint16)


def _card() -> str | None:
    """Returns what NVIDIA's driver says of the card; None where there is none."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit,memory.total"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
