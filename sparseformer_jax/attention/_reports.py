"""What a method reports beside its output, checked and summed over local tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def weighed(losses: Mapping[str, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
    """Returns the sum of each loss over tokens.

    Raises:
      ValueError: one is not one number a token.
    """
    for name, loss in losses.items():
        if loss.shape != weights.shape:
            raise ValueError(
                f"loss {name!r} of shape {loss.shape}: give one a token, {weights.shape}"
            )
    return {name: jnp.sum(weights * x.astype(jnp.float32)) for name, x in losses.items()}


def checked(
    axes: Mapping[str, tuple[str | None, ...]], statistics: dict[str, jax.Array]
) -> dict[str, Any]:
    """Returns the statistics, without gradient.

    Raises:
      ValueError: they are not those that the method names, of as many dimensions.
    """
    if {name: x.ndim for name, x in statistics.items()} != {n: len(a) for n, a in axes.items()}:
        shapes = {name: x.shape for name, x in statistics.items()}
        raise ValueError(
            f"statistics of shapes {shapes} are not those of statistics_axes={dict(axes)}"
        )
    return jax.lax.stop_gradient(statistics)
