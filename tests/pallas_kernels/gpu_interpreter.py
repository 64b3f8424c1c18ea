"""The interpreter of Mosaic GPU kernels: made quick enough for tests, and to tell of races."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import thread_map

from pallas_kernels.block_sparse_attention.mosaic_gpu import kernels
from pallas_kernels.targets import Target

HOPPER = Target("cuda", "NVIDIA H200", 90)
INTERPRETED = dataclasses.replace(HOPPER, interpret=True)
SIMULATED = dataclasses.replace(
    HOPPER, interpret=dataclasses.replace(kernels.interpreter(), detect_races=True)
)
"""Follows what every thread knows of the others, and prints unordered accesses."""


def compile_once(monkeypatch: Any) -> None:
    """Lets the interpreter compile a kernel once.

    It would compile it for every thread of every block of the grid, which are
    hundreds of times the same program. These threads wait for one another in XLA's own:
    it must have more of them than the kernel, which it has with several devices.
    """
    assert jax.local_device_count() >= 4
    compiled: dict[int, tuple[Any, Callable[..., Any]]] = {}
    lock = threading.Lock()

    def run(jaxpr: Any, consts: Any, *arguments: Any) -> None:
        def evaluate(consts: Any, *arguments: Any) -> None:
            jax.core.eval_jaxpr(jaxpr, consts, *arguments)

        with lock:
            if id(jaxpr) not in compiled:
                program = jax.jit(evaluate).lower(consts, *arguments).compile()
                # The jaxpr is kept alive: ids of dead objects come again.
                compiled[id(jaxpr)] = (jaxpr, program)
        compiled[id(jaxpr)][1](consts, *arguments)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
