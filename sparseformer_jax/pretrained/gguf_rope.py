"""Scalings of rotary positions as GGUF files have them, in the words of config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from sparseformer_jax.checks import ConfigError

# What Llama 3.1 and its successors differ from in their factor alone.
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192

_NAMES = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def named_scaling(own: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Returns the scaling that metadata name; None: there is none.

    Args:
      own: metadata of the architecture, without its prefix.
      where: the file, for messages.

    Raises:
      ConfigError: it has a factor on attention, which config.json does not tell apart.
    """
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = own.get("rope.scaling.attn_factor", 1.0)
    if factor != 1:
        raise ConfigError(f"{where}: rope.scaling.attn_factor={factor}: only 1 is supported")
    found = {theirs: own.get(f"rope.scaling.{name}") for name, theirs in _NAMES.items()}
    return {"rope_type": kind, **found}


def listed_scaling(
    divisors: Float[np.ndarray, " pairs"], theta: float, where: str
) -> dict[str, Any]:
    """Returns the llama3 scaling that a file lists as a divisor of each frequency.

    Raises:
      ConfigError: no factor of Llama 3.1's scaling gives these divisors.
    """
    factor = float(np.max(divisors, initial=1.0))
    expected = _llama3_divisors(factor, theta, len(divisors))
    # Both were computed in float32 at least.
    if not np.allclose(divisors, expected, rtol=1e-5, atol=0):
        raise ConfigError(
            f"{where}: rope_freqs.weight is no scaling as Llama 3.1 has; take the model's "
            "safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _CONTEXT,
    }


def _llama3_divisors(factor: float, theta: float, number: int) -> np.ndarray:
    """What slows each pair: 1 where waves are short, the factor where long, between in between."""
    waves = _CONTEXT / (2 * np.pi) * theta ** (-np.arange(number) / number)  # in the context
    smooth = np.clip((waves - _LOW) / (_HIGH - _LOW), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
