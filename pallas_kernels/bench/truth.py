"""Checks an attention function against `reference` at any length.

The reference builds all scores, so it runs on chunks of queries, and on the first
key/value head with its group of query heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.bench.cases import Case
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import block_sparse_attention

_CHUNK = 512
# Relative to the largest value of an array; a rounding of a product's sum.
_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
_NAMES = ("out", "d_query", "d_key", "d_value")


def first_group(case: Case, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns the arrays of the first key/value head."""
    group = case.heads // case.kv_heads
    query, key, value, d_out = arrays
    return query[:, :, :group], key[:, :, :1], value[:, :, :1], d_out[:, :, :group]


def errors(case: Case, results: tuple[Array, ...], truth: tuple[Array, ...]) -> dict[str, float]:
    """Returns the largest error of out and, where given, of dQ, dK and dV of the first group.

    Each is relative to the largest value of its array; not a number where a result is none.
    """
    actual = first_group(case, (results[0],) * 4)[:1]
    if len(results) > 1:
        d_query, d_key, d_value = results[1:]
        actual = (*actual, *first_group(case, (d_query, d_key, d_value, d_query))[:3])
    found = {}
    for name, one, other in zip(_NAMES, actual, truth, strict=False):
        distance = jnp.abs(one.astype(other.dtype) - other).max()
        found[name] = float(distance / jnp.abs(other).max())
    return found


def tolerance(case: Case) -> float:
    """Returns the largest error that rounding explains."""
    return _TOLERANCE[case.dtype]


def check(case: Case, results: tuple[Array, ...], truth: tuple[Array, ...], *, of: str) -> None:
    """Compares with the truth.

    Raises:
        ValueError: they differ by more than rounding.
    """
    for name, error in errors(case, results, truth).items():
        if not error <= tolerance(case):
            raise ValueError(f"{of}: {name} is off by {error:.1e} of its largest value")


def expected(case: Case, arrays: tuple[Array, ...], dtype: Any = jnp.float32) -> tuple[Array, ...]:
    """Returns out, dQ, dK and dV of the first group, computed in a dtype."""
    return program(case, dtype)(*first_group(case, arrays))


def program(case: Case, dtype: Any = jnp.float32) -> Any:
    """Returns the function of the first group's arrays under `jax.jit`: out, dQ, dK and dV."""
    size = case.block_size
    chunk = size * max(1, min(_CHUNK, case.length) // size)
    while case.length % chunk:
        chunk -= size
    blocks = jnp.asarray(case.block_map[:1]).reshape(1, -1, chunk // size, case.length // size)
    blocks = blocks.swapaxes(0, 1)
    starts = jnp.arange(0, case.length, chunk)

    def attend(query: Array, key: Array, value: Array) -> Array:
        def attend_chunk(chunk_of_query: Array, blocks: Array, start: Array) -> Array:
            block_mask = BlockMask.from_block_map(
                blocks, chunk, case.length, size, size, is_causal=True, query_offset=start
            )
            out, _ = block_sparse_attention(
                chunk_of_query,
                key,
                value,
                block_mask,
                is_causal=True,
                implementation="reference",
                return_lse=True,
            )
            return out

        chunks = query.reshape(1, -1, chunk, *query.shape[2:]).swapaxes(0, 1)
        once: Callable[..., Array] = jax.checkpoint(attend_chunk)
        out = lax.map(lambda args: once(*args), (chunks, blocks, starts))
        return out.swapaxes(0, 1).reshape(query.shape)

    def run(*arrays: Array) -> tuple[Array, ...]:
        *inputs, d_out = (array.astype(dtype) for array in arrays)
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(d_out)

    return jax.jit(run)
