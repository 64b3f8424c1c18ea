"""float32 matrices as sums of three bfloat16 ones, as WGMMA would round them to TF32.

    x = x0 + x1 + x2,   x0 = bf16(x),   x1 = bf16(x - x0),   x2 = bf16(x - x0 - x1)

is exact, three times eight bits for the 24 of float32, but for numbers near the smallest.
A product of two such sums takes the six pairs with i + j < 3: the others are beyond the
last bit of the first. bfloat16 and float16 matrices are sums of one piece.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_DTYPE = jnp.bfloat16
_EXPONENT_BITS, _MANTISSA_BITS = 8, 7


def count(dtype: Any) -> int:
    """Returns of how many pieces a matrix is the sum."""
    return 3 if dtype == jnp.float32 else 1


def split(array: Float[Array, "B *rest"]) -> Float[Array, "BP *rest"]:
    """Returns the pieces, those of a batch entry one after another."""
    if count(array.dtype) == 1:
        return array
    found, rest = [], array
    for _ in range(count(array.dtype)):
        # A cast there and back would be taken out by XLA.
        rounded = lax.reduce_precision(rest, _EXPONENT_BITS, _MANTISSA_BITS)
        found.append(rounded.astype(_DTYPE))
        rest = rest - rounded
    return jnp.stack(found, axis=1).reshape(-1, *array.shape[1:])


def places(ref: Any, number: int, batch: Int[Array, ""], *place: Any) -> tuple[Any, ...]:
    """Returns references to the pieces, in a batch entry of what `split` returned."""
    return tuple(ref.at[batch * number + piece, *place] for piece in range(number))


def pairs(left: Sequence[Any], right: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Returns the pairs of pieces whose products make up that of the sums."""
    return [(x, y) for i, x in enumerate(left) for y in right[: len(left) - i]]
