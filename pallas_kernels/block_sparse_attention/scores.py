"""From raw query-key products to logits: the scale and the soft cap, with the slope."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.checks import is_finite_number, shown


@dataclasses.dataclass(frozen=True)
class Scores:
    """Logits s of raw products x: s = x * scale, or c * tanh(x * scale / c) if capped.

    Raises:
        ValueError: scale is no finite number, or soft_cap is not positive and finite.
    """

    scale: float
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if not is_finite_number(self.scale):
            raise ValueError(f"scale={shown(self.scale)} must be a finite Python number")
        cap = self.soft_cap
        if cap is not None and not (is_finite_number(cap) and cap > 0):
            raise ValueError(
                f"logits_soft_cap={shown(cap)} must be positive and finite: None means no cap"
            )

    def logits(self, raw: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns s."""
        scaled = raw * self.scale
        if self.soft_cap is None:
            return scaled
        return self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def slope(self, logits: Float[Array, "..."]) -> Float[Array, "..."] | float:
        """Returns ds/dx where s has the given values: scale * (1 - (s / c)^2)."""
        if self.soft_cap is None:
            return self.scale
        return self.scale * (1 - jnp.square(logits / self.soft_cap))
