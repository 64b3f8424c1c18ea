"""What is timed side by side: our implementations, and what a user would pick instead.

Each contender prepares a case: it returns a forward and a backward function over JAX
arrays or its own, or raises `Unavailable` with the reason.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.timing import repeated
from pallas_kernels.block_sparse_attention import block_sparse_attention, explain

# More than this for the scores of jax.nn would not fit beside anything else.
_MOST_SCORES = 2**34


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Functions that run so many times and wait, and their results as JAX arrays.

    Attributes:
        forward: runs the forward pass.
        backward: runs the backward pass alone; None where there is none.
        results: returns (out, dQ, dK, dV), or (out,) without a backward pass.
        is_sparse: it reads the block mask of the case, and not the causal triangle.
        temporary_mib: returns what the compiler reserves for forward and backward beside
            inputs and outputs; None where no compiler tells.
    """

    forward: Callable[[int], object]
    backward: Callable[[int], object] | None
    results: Callable[[], tuple[Array, ...]]
    is_sparse: bool
    temporary_mib: Callable[[], float | None] = lambda: None


def ours(case: Case, arrays: tuple[Array, ...], implementation: str | None) -> Prepared:
    """Prepares `block_sparse_attention` with the mask of the case."""
    block_mask = case.block_mask()
    query, key, value, _ = arrays
    choice = explain(query, key, value, block_mask, is_causal=True, implementation=implementation)
    if choice.taken is None:
        raise Unavailable("; ".join(choice.refusals.values()))
    attend: Callable[..., Any] = functools.partial(
        block_sparse_attention,
        block_mask=block_mask,
        is_causal=True,
        implementation=choice.taken,
    )
    return _prepare_jax(attend, arrays, is_sparse=True)


def jax_nn(case: Case, arrays: tuple[Array, ...], implementation: str) -> Prepared:
    """Prepares `jax.nn.dot_product_attention`, dense and causal."""
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Unavailable("cuDNN needs an NVIDIA GPU")
    if implementation == "xla" and 4 * case.heads * case.length**2 > _MOST_SCORES:
        raise Unavailable(
            f"its scores would take {4 * case.heads * case.length**2 / 2**30:.0f} GiB"
        )
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )
    return _prepare_jax(attend, arrays, is_sparse=False)


def splash(case: Case, arrays: tuple[Array, ...]) -> Prepared:
    """Prepares JAX's splash attention for TPU, with the mask of the case."""
    if jax.default_backend() != "tpu":
        raise Unavailable("splash attention needs a TPU")
    from pallas_kernels.bench import splash_attention

    return _prepare_jax(splash_attention.of(case), arrays, is_sparse=True)


def torch_sdpa(case: Case, arrays: tuple[Array, ...]) -> Prepared:
    """Prepares PyTorch's `scaled_dot_product_attention`, dense and causal."""
    return _torch().sdpa(case, arrays)


def torch_flex(case: Case, arrays: tuple[Array, ...]) -> Prepared:
    """Prepares PyTorch's FlexAttention with the block mask of the case."""
    return _torch().flex(case, arrays)


Contender = Callable[[Case, tuple[Array, ...]], Prepared]
BASELINES: dict[str, Contender] = {
    "jax.nn": functools.partial(jax_nn, implementation="xla"),
    "cudnn": functools.partial(jax_nn, implementation="cudnn"),
    "torch": torch_sdpa,
    "flex": torch_flex,
    "splash": splash,
}


def _torch() -> Any:
    try:
        from pallas_kernels.bench import torch_attention
    except ImportError as error:
        raise Unavailable("PyTorch is not installed") from error
    return torch_attention


def _prepare_jax(
    attend: Callable[..., Array], arrays: tuple[Array, ...], *, is_sparse: bool
) -> Prepared:
    """Compiles both passes; runs neither."""
    *inputs, d_out = arrays
    vjp = jax.jit(functools.partial(jax.vjp, attend))
    forward = jax.jit(attend).lower(*inputs).compile()
    linearize = vjp.lower(*inputs).compile()
    _, pull = jax.eval_shape(vjp, *inputs)
    pull_back = jax.jit(lambda pull, d_out: pull(d_out)).lower(pull, d_out).compile()

    def results() -> tuple[Array, ...]:
        out, pull = linearize(*inputs)
        return out, *pull_back(pull, d_out)

    # The residuals are made when the backward pass first runs: forward alone may fit
    # where both do not.
    residuals = functools.cache(lambda: linearize(*inputs)[1])
    return Prepared(
        repeated(forward, *inputs),
        lambda times: repeated(pull_back, residuals(), d_out)(times),
        results,
        is_sparse,
        functools.partial(_temporary_mib, attend, arrays),
    )


def _temporary_mib(attend: Callable[..., Array], arrays: tuple[Array, ...]) -> float | None:
    def both(query: Array, key: Array, value: Array, d_out: Array) -> Any:
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(d_out)

    analysis = jax.jit(both).lower(*arrays).compile().memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / 2**20
