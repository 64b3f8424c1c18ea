"""Which entries of a matrix [I, O] are kept by their scores: n of every m, or a fraction."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.sparsity import nm

# Of products of a size and a share, which stand for whole numbers but for rounding.
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """A fraction of all weights, wherever they stand.

    Attributes:
      density: the kept fraction.

    Raises:
      ConfigError: it is not above 0 and below 1.
    """

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ConfigError(f"pattern {self}: the kept fraction must be above 0 and below 1")

    def __str__(self) -> str:
        return f"{self.density:g}"

    def num_dropped(self, size: int) -> int:
        """Returns how many of so many weights are dropped: the share, rounded down."""
        return math.floor(round(size * (1 - self.density), _DIGITS))


AnyPattern = nm.Pattern | Unstructured


def parse(text: str) -> AnyPattern:
    """Returns the pattern that is written as "2:4", or as "0.5", the kept fraction.

    Raises:
      ConfigError: it is neither.
    """
    if ":" in text:
        return nm.Pattern.parse(text)
    try:
        density = float(text)
    except ValueError:
        raise ConfigError(
            f"pattern {text!r}: must be n:m, as 2:4, or the kept fraction, as 0.5"
        ) from None
    return Unstructured(density)


def grouped(scores: Float[Array, "I O"], pattern: nm.Pattern) -> Bool[Array, "I O"]:
    """Returns which entries are the n largest of every m inputs.

    Raises:
      ConfigError: the inputs do not divide into groups.
    """
    return nm.mask(scores, pattern.n, pattern.m, axis=-2)


def beyond_share(pattern: Unstructured, size: int) -> int:
    """Returns how many go where all up to the entry at the share are dropped, it too; not all."""
    return min(pattern.num_dropped(size) + 1, size - 1)


def by_output(scores: Float[Array, "I O"], num_dropped: int) -> Bool[Array, "I O"]:
    """Returns all but so many of each output, the smallest; of equal ones the first go."""
    return _all_but(scores, num_dropped)


def of_all(scores: Float[Array, "I O"], num_dropped: int | Int[Array, ""]) -> Bool[Array, "I O"]:
    """Returns all but so many of the whole matrix, the smallest; of equal ones the first go."""
    return _all_but(scores.reshape(-1, 1), num_dropped).reshape(scores.shape)


def _all_but(scores: Float[Array, "I O"], num: int | Int[Array, ""]) -> Bool[Array, "I O"]:
    order = jnp.argsort(scores, axis=0, stable=True)
    dropped = jnp.broadcast_to(jnp.arange(len(scores))[:, None] < num, scores.shape)
    return jnp.put_along_axis(jnp.zeros_like(dropped), order, ~dropped, axis=0, inplace=False)
