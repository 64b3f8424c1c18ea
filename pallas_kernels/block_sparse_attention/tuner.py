"""Measures the plans that kernels could use for a call, and remembers the fastest.

A backend offers `plans`, the one it takes unless told otherwise first, and `run`. What
was measured holds for the process; nothing is measured unless `autotune` is called.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from tqdm import tqdm

from pallas_kernels import targets
from pallas_kernels.block_sparse_attention import tuned
from pallas_kernels.block_sparse_attention.arguments import checked
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.differentiable import Plan
from pallas_kernels.block_sparse_attention.selection import IMPLEMENTATIONS

_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Report:
    """What `autotune` measured for one implementation.

    Attributes:
        implementation: its name.
        plans: what was tried, the default first.
        ms: milliseconds of forward and backward, by number of the plan.
        failures: reasons of those that could not be compiled or run, by number.
    """

    implementation: str
    plans: tuple[Plan, ...]
    ms: dict[int, float]
    failures: dict[int, str]

    @property
    def fastest(self) -> Plan:
        """The plan that is used from now on: the default, if all failed."""
        return self.plans[min(self.ms, key=self.ms.__getitem__, default=0)]

    def __str__(self) -> str:
        lines = [f"{self.implementation}:"]
        for number, plan in enumerate(self.plans):
            result = f"{self.ms[number]:.3g} ms" if number in self.ms else self.failures[number]
            mark = " (taken)" if plan == self.fastest else ""
            lines.append(f"  {describe(plan)}: {result}{mark}")
        return "\n".join(lines)


def autotune(
    *arrays: Any, implementation: str | Sequence[str] | None = None, **options: Any
) -> list[Report]:
    """Measures forward and backward with every plan of the kernels that can run a call.

    Pass what you would pass to `block_sparse_attention`. From then on, and for as long
    as the process lives, functions traced with calls of these shapes, limits and blocks
    use the fastest plan. A plan that cannot be compiled or run is passed over; when all
    fail, the default stays.

    Returns:
        a report for each implementation that has plans to choose from; print it.

    Raises:
        ValueError: arguments do not fit together, or implementation is unknown.
    """
    call = checked(*arrays, **options)
    target = targets.current()
    reports = []
    for name in IMPLEMENTATIONS.asked_for(implementation):
        backend = IMPLEMENTATIONS.load(name)
        if not hasattr(backend, "plans") or backend.refusal(call, target) is not None:
            continue
        if plans := backend.plans(call, target):
            report = _measure(name, backend.run, call, plans)
            tuned.remember(call, report.plans, report.fastest)
            reports.append(report)
    return reports


def _measure(
    name: str, run: Callable[..., tuple[Array, Array]], call: Call, plans: tuple[Plan, ...]
) -> Report:
    ms, failures = {}, {}
    for number, plan in enumerate(tqdm(plans, desc=name, leave=False, disable=None)):
        try:
            ms[number] = _time(run, plan, call)
        # Whatever a compiler or a launch complains of: shared memory, registers, a bug.
        except Exception as error:
            failures[number] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return Report(name, plans, ms, failures)


def _time(run: Callable[..., tuple[Array, Array]], plan: Plan, call: Call) -> float:
    def attend(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        return run(plan, dataclasses.replace(call, query=query, key=key, value=value))

    @jax.jit
    def both(*inputs: Array) -> tuple[Array, ...]:
        outputs, pull = jax.vjp(attend, *inputs)
        return pull((jnp.ones_like(outputs[0]), jnp.zeros_like(outputs[1])))

    inputs = (call.query, call.key, call.value)
    jax.block_until_ready(both(*inputs))
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(both(*inputs))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def describe(plan: Plan) -> str:
    """Returns the tiles of a plan, and what else it chooses, in one line."""
    tilings = {"forward": plan.forward, "dQ": plan.d_query, "dK dV": plan.d_key}
    tiles = [f"{name} {t.query_tile}x{t.key_tile}" for name, t in tilings.items()]
    return ", ".join(tiles if plan.options is None else [*tiles, str(plan.options)])
