"""The range of every number in a config: generous, but finite.

The upper ends are far beyond any use. They keep out what overflows float32 or int32 in the
middle of a run, and slips such as a rate for a number of steps.
"""

import math
from typing import Any

from sparseformer_jax.checks import ConfigError

_COUNT = (1, 10**9)  # fits int32, in which steps are counted
_COUNT_OR_NONE = (0, 10**9)
_WIDTH = (1, 10**6)
_TOKENS = (1, 2**22)
_ROPE_THETA = (1, 1e12)
_TURNS = (1e-6, 1e6)  # of a rotary pair
# Below one by more than the rounding of float32, in which 1 - x is divided by.
_FRACTION = (0, 0.9999)

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "model.vocab_size": (1, 10**8),
    "model.num_layers": (1, 10**4),
    "model.embed_dim": _WIDTH,
    "model.num_heads": (1, 10**4),
    "model.num_kv_heads": (1, 10**4),
    "model.head_dim": (1, 10**4),
    "model.mlp_dim": (1, 10**7),
    "model.rope_theta": _ROPE_THETA,
    "model.rope_factor": (1, 1e6),
    "model.rope_original_positions": _TOKENS,
    "model.rope_low_freq_factor": _TURNS,
    "model.rope_high_freq_factor": _TURNS,
    "model.rope_beta_slow": _TURNS,
    "model.rope_beta_fast": _TURNS,
    "model.rope_attention_factor": (1e-3, 1e3),
    "model.partial_rotary_factor": (1e-4, 1),
    "model.rope_local_theta": _ROPE_THETA,
    "model.max_positions": _TOKENS,
    "model.norm_eps": (1e-12, 0.1),
    "model.embedding_scale": (1e-6, 1e6),
    "model.attention_scale": (1e-6, 1e3),
    "model.attention_soft_cap": (0.01, 1e6),
    "model.logits_soft_cap": (0.01, 1e6),
    "model.dropout": (0, 0.99),
    "data.validation_fraction": _FRACTION,
    "data.test_fraction": _FRACTION,
    "data.seq_len": _TOKENS,
    "data.prefetch": (0, 1000),
    "data.num_threads": (0, 1000),
    "train.num_steps": _COUNT,
    "train.batch_size": (1, 10**7),
    "train.accumulation_steps": (1, 10**6),
    "train.z_loss": (0, 1e3),
    "train.log_every": _COUNT,
    "optimizer.learning_rate": (1e-12, 1e3),
    "optimizer.warmup_steps": _COUNT_OR_NONE,
    "optimizer.decay_steps": _COUNT_OR_NONE,
    "optimizer.final_fraction": (0, 1),
    "optimizer.weight_decay": (0, 1e3),
    "optimizer.b1": _FRACTION,
    "optimizer.b2": (0, 0.999999),
    "optimizer.eps": (1e-30, 1),
    "optimizer.momentum": _FRACTION,
    "optimizer.clip_norm": (0, 1e12),
    "eval.every": _COUNT_OR_NONE,
    "eval.num_batches": _COUNT_OR_NONE,
    "eval.batch_size": (1, 10**7),
    "checkpoint.every": _COUNT_OR_NONE,
    "checkpoint.keep_last": _COUNT,
    "checkpoint.keep_every": _COUNT_OR_NONE,
}

# Of an option of a method, which may count blocks, tokens or heads.
_OPTION = 2**22


def check_ranges(values: dict[str, Any]) -> None:
    """Raises ConfigError for a number of a flattened config that is out of its range or NaN."""
    for field, (low, high) in RANGES.items():
        value = values[field]
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{field}={value}: must be from {low:,} to {high:,}")


def check_option(field: str, value: Any) -> None:
    """Raises ConfigError for a number of a method's option, or in it, that no method can mean."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int) and abs(number) > _OPTION:
            raise ConfigError(f"{field}={value}: must be from {-_OPTION:,} to {_OPTION:,}")
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{field}={value}: must be a finite number")
