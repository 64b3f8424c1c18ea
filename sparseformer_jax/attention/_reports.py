"""What a method reports beside its output, checked and summed over local tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def weighed(name: str, loss: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the sum of a loss over tokens.

    Raises:
      ValueError: it is not one number a token.
    """
    if loss.shape != weights.shape:
        raise ValueError(f"loss {name!r} of shape {loss.shape}: give one a token, {weights.shape}")
    return jnp.sum(weights * loss.astype(jnp.float32))


def checked(
    axes: Mapping[str, tuple[str | None, ...]], statistics: dict[str, jax.Array]
) -> dict[str, Any]:
    """Returns the statistics.

    Raises:
      ValueError: they are not those that the method names, of as many dimensions.
    """
    if {name: x.ndim for name, x in statistics.items()} != {n: len(a) for n, a in axes.items()}:
        shapes = {name: x.shape for name, x in statistics.items()}
        raise ValueError(
            f"statistics of shapes {shapes} are not those of statistics_axes={dict(axes)}"
        )
    return statistics
