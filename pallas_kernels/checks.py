"""The checks of arguments that operations and masks share, each mistake told in one line."""

import math
import numbers
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# What a traced comparison with positions can hold.
_LARGEST = 2**31 - 1


def check_integer(name: str, value: Any, least: int | None = 1) -> None:
    """Raises ValueError unless value is an integer, not below least."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be an integer")
    if least is not None and value < least:
        limit = "not be negative" if least == 0 else f"be at least {least}"
        raise ValueError(f"{name}={value} must {limit}")
    if abs(int(value)) > _LARGEST:
        raise ValueError(f"{name}={value} must be at most {_LARGEST}")


def check_flag(name: str, value: object) -> None:
    """Raises ValueError unless value is a boolean known on the host."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={shown(value)} must be True or False")


def is_finite_number(value: Any) -> bool:
    """Returns whether value is a finite real number known on the host."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_array(name: str, value: object) -> None:
    """Raises ValueError unless value is an array, numpy's or JAX's."""
    if not isinstance(value, np.ndarray | jax.Array):
        raise ValueError(f"{name} is {type(value).__name__}: pass an array")


def check_heads(query: Array, key: Array) -> None:
    """Raises ValueError unless query [B, T, N, H] and key [B, S, K, H] fit together."""
    for name, array in {"query": query, "key": key}.items():
        check_array(name, array)
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(
                f"{name} has shape {array.shape}: pass [batch, length, heads, head_dim], "
                "none of them 0"
            )
    batch, _, num_heads, head_dim = query.shape
    if (key.shape[0], key.shape[3]) != (batch, head_dim) or num_heads % key.shape[2]:
        raise ValueError(
            f"key has shape {key.shape}, query {query.shape}: pass equal batch and "
            "head_dim, and key heads that divide the query heads"
        )


def check_dtypes(**arrays: Array) -> None:
    """Raises ValueError unless the arrays have one floating dtype of 16 bits or more."""
    (first, dtype), *_ = ((name, array.dtype) for name, array in arrays.items())
    is_wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    for name, array in arrays.items():
        if array.dtype != dtype or not is_wide:
            raise ValueError(
                f"{name} is {array.dtype}, {first} {dtype}: cast {', '.join(arrays)} to "
                "one floating dtype of 16 bits or more"
            )


def check_segments(query: Array, key: Array, segment_ids: Any) -> None:
    """Raises ValueError unless segment_ids are integers ([B, T], [B, S]), or None."""
    shapes = [query.shape[:2], key.shape[:2]]
    is_pair = isinstance(segment_ids, tuple | list)
    if segment_ids is None or (is_pair and [*map(_integer_shape, segment_ids)] == shapes):
        return
    given = f"({', '.join(map(shown, segment_ids))})" if is_pair else shown(segment_ids)
    raise ValueError(
        f"segment_ids are {given}: pass integers (query {list(shapes[0])}, key {list(shapes[1])})"
    )


def shown(value: Any) -> str:
    """Returns a value as errors show it: short, an array by its dtype and shape."""
    is_array = isinstance(value, np.ndarray | jax.Array)
    return f"{value.dtype}{list(value.shape)}" if is_array else reprlib.repr(value)


def _integer_shape(ids: Any) -> tuple[int, ...] | None:
    is_array = isinstance(ids, np.ndarray | jax.Array)
    return ids.shape if is_array and jnp.issubdtype(ids.dtype, jnp.integer) else None
