"""Triton kernels called from JAX: the one file that imports jax_triton."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.targets import Target

OLDEST, NEWEST = (3, 6), (3, 9)
"""The versions of Triton that compile the kernels, as setup.cfg asks for them."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a program runs on.

    Attributes:
        warps: groups of 32 threads.
        stages: depth of the pipeline that loads ahead of the products.
    """

    warps: int
    stages: int


@functools.cache
def refusal() -> str | None:
    """Returns why Triton kernels cannot be built in this installation; None if they can."""
    try:
        import jax_triton  # It needs a jaxlib with GPU support.
    except ImportError as error:
        return f'jax_triton cannot be imported: pip install "sparseformer_jax[triton]" ({error})'
    if not jax_triton.triton_lib.CAN_USE_TRITON:
        return 'triton cannot be imported: pip install "sparseformer_jax[triton]"'
    import triton

    return _refusal_of_version(triton.__version__)


def call(
    kernel: Any,
    *arrays: Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    resources: Resources,
    target: Target,
    zeroed: bool = False,
    **constants: Any,
) -> tuple[Array, ...]:
    """Returns the arrays that a kernel writes.

    Args:
        kernel: a function under `triton.jit`: pointers to the arrays, pointers to the
            results, then compile-time constants.
        *arrays: what it reads, row-major.
        out_shape: shapes of what it writes.
        programs: how many there are, numbered from 0.
        resources: what each runs on.
        target: the machine that it is compiled for.
        zeroed: fill the results with zeros first, for kernels that leave some out.
        **constants: the compile-time constants, hashable.
    """
    import jax_triton

    results = jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=tuple(out_shape),
        grid=(programs,),
        name=kernel.fn.__name__,
        num_warps=resources.warps,
        num_stages=resources.stages,
        compute_capability=target.compute_capability,
        zeroed_outputs=tuple(range(len(out_shape))) if zeroed else (),
        **constants,
    )
    return tuple(results)


def _refusal_of_version(version: str) -> str | None:
    major, minor, *_ = version.split(".")
    if OLDEST <= (int(major), int(minor)) <= NEWEST:
        return None
    oldest, newest = ("{}.{}".format(*limit) for limit in (OLDEST, NEWEST))
    return f'triton {version} must be {oldest} to {newest}: pip install "sparseformer_jax[triton]"'
