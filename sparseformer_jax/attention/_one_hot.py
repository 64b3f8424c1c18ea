"""What every query gives every key, read off any method: its outputs for one-hot values."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparseformer_jax.attention.inputs import Inputs


def weights(
    inputs: Inputs, attend: Callable[[Inputs], dict[str, Float[Array, "R T N H"]]]
) -> dict[str, Float[Array, "B N T S"]]:
    """Returns the weights w of outputs that are linear in the values, o_i = sum_j w_ij v_j.

    With v_j the unit vectors, o_i holds w_ij for as many keys as a head has channels, so all
    are told by ceil(S / H) copies of the rows, R = B ceil(S / H), each with other unit vectors.

    Args:
      inputs: of the attention, all but its values.
      attend: the outputs by name; the weights are named alike.
    """
    batch, num_keys, kv_heads, size = inputs.value.shape
    copies = -(-num_keys // size)
    unit = jnp.eye(num_keys, copies * size, dtype=inputs.value.dtype)
    unit = unit.reshape(num_keys, copies, 1, size).swapaxes(0, 1)  # [copies, S, 1, H]
    value = jnp.broadcast_to(unit, (copies, num_keys, kv_heads, size))

    def repeated(x: jax.Array) -> jax.Array:
        return x if jnp.ndim(x) == 0 else jnp.concatenate([x] * copies)

    def joined(output: jax.Array) -> jax.Array:
        parts = output.reshape(copies, batch, *output.shape[1:])
        parts = parts.transpose(1, 3, 2, 0, 4)  # [B, N, T, copies, H]
        return parts.reshape(*parts.shape[:3], -1)[..., :num_keys]

    copied = jax.tree.map(repeated, inputs)
    outputs = attend(dataclasses.replace(copied, value=jnp.repeat(value, batch, axis=0)))
    return {name: joined(output) for name, output in outputs.items()}
