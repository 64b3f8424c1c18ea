"""What one-shot pruning knows of a projection's inputs: sums over samples and tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over samples of T tokens each, x [samples, T, I]; those of batches add up.

    Attributes:
      samples: how many.
      tokens: of all of them.
      sums: [I], of x.
      squares: [I], of x^2.
      deviations: [I], of (x - mean of its sample)^2.
      products: [I, I], of x x'; None where nothing reads it.
    """

    # Any: JAX also builds it of other leaves.
    samples: Any
    tokens: Any
    sums: Any
    squares: Any
    deviations: Any
    products: Any = None

    @classmethod
    def of(cls, x: Float[Array, "B T I"], *, products: bool) -> "Statistics":
        """Returns the float32 sums of a batch, with products if asked for."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=1, keepdims=True)
        total = functools.partial(jnp.sum, axis=(0, 1))
        flat = x.reshape(-1, x.shape[-1])
        return cls(
            samples=jnp.float32(x.shape[0]),
            tokens=jnp.float32(len(flat)),
            sums=total(x),
            squares=total(jnp.square(x)),
            deviations=total(jnp.square(centred)),
            products=jnp.matmul(flat.T, flat, precision="highest") if products else None,
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        return jax.tree.map(jnp.add, self, other)

    def take(self, order: Int[Array, " I"]) -> "Statistics":
        """Returns the sums of the inputs in another order."""
        of_inputs = {name: getattr(self, name)[order] for name in ("sums", "squares", "deviations")}
        products = None if self.products is None else self.products[order][:, order]
        return dataclasses.replace(self, **of_inputs, products=products)

    @property
    def mean_sum(self) -> Float[Array, " I"]:
        """The mean over samples of the sum over tokens of x."""
        return self.sums / self.samples

    @property
    def mean_square(self) -> Float[Array, " I"]:
        """The mean over samples of the sum over tokens of x^2."""
        return self.squares / self.samples

    @property
    def variance(self) -> Float[Array, " I"]:
        """The variance inside samples, their means apart."""
        return self.deviations / self.tokens

    @property
    def hessian(self) -> Float[Array, "I I"]:
        """2 x x', the second derivative of the squared error of an output; a mean over samples."""
        return 2 * self.products / self.samples
