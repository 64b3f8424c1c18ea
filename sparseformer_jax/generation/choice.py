"""Which token comes next: the likeliest, or one drawn from the likely ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sparseformer_jax.checks import ConfigError


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token is chosen by the logits.

    Attributes:
      temperature: of the softmax, 0.001 to 1000; 0 takes the likeliest token.
      top_k: how many of the likeliest may be drawn, those as likely as the last too; 0: all.
      top_p: the likeliest may be drawn until their probability, at the temperature, is this
        (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751, section 3.1); 1: all.

    Raises:
      ConfigError: a number is out of its range, or read by nothing, as the temperature is 0.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(
                f"--temperature={self.temperature}: must be from 0.001 to 1000, or 0 for the "
                "likeliest"
            )
        if self.top_k < 0:
            raise ConfigError(f"--top_k={self.top_k}: must be at least 1, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p={self.top_p}: must be above 0, to 1 for all")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            name = f"top_k={self.top_k}" if self.top_k else f"top_p={self.top_p}"
            raise ConfigError(f"--{name}: --temperature=0 takes the likeliest; leave one out")

    def __call__(self, logits: Float[Array, " V"], key: Key[Array, ""]) -> Int[Array, ""]:
        """Returns a token by its logits."""
        if self.temperature == 0:
            return jnp.argmax(logits)
        # The largest is 0 before the division, so that none overflows.
        scaled = (logits - jnp.max(logits)).astype(jnp.float32) / self.temperature
        return jax.random.categorical(key, self._kept(scaled))

    def _kept(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        """The logits, -inf where a token may not be drawn."""
        if 0 < self.top_k < logits.size:
            least = jax.lax.top_k(logits, self.top_k)[0][-1]
            logits = jnp.where(logits >= least, logits, -math.inf)
        if self.top_p == 1:
            return logits
        ordered = jnp.sort(logits, descending=True)
        likelier = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
        # The first is kept whatever its probability.
        least = jnp.min(jnp.where(likelier < self.top_p, ordered, math.inf))
        return jnp.where(logits >= least, logits, -math.inf)
