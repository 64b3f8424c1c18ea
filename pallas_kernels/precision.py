"""What a product of float32 numbers is: of float32, where a machine would round them."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def exact(dtype: Any) -> lax.Precision:
    """Returns the precision of products of this type whose only roundings are float32's.

    By default a TPU rounds the factors to bfloat16, and a GPU to TF32.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize > 2 else lax.Precision.DEFAULT
