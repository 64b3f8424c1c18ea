"""What a task of lm-evaluation-harness asks of generation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparseformer_jax.checks import ConfigError

_DEFAULT_MAX_TOKENS = 256  # as the models there have it

# All mean the same there; the first that is given counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

# Read by sampling, and without meaning to greedy decoding.
_OF_SAMPLING = ("temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy decoding.

    Attributes:
      until: strings that the text ends before.
      max_tokens: of the text.
    """

    until: tuple[str, ...]
    max_tokens: int

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "Generation":
        """Returns what `generation_kwargs` of a task say.

        Raises:
          ConfigError: they ask for anything but greedy decoding.
        """
        left = {name: value for name, value in settings.items() if value is not None}
        until = left.pop("until", ())
        until = (until,) if isinstance(until, str) else until
        counts = [left.pop(name) for name in _MAX_TOKENS if name in left]
        is_sampled = left.pop("do_sample", float(left.get("temperature", 0)) > 0)
        sampling = {name: left.pop(name) for name in _OF_SAMPLING if name in left}
        if is_sampled:
            shown = ", ".join(f"{name}={value}" for name, value in sampling.items())
            raise ConfigError(
                f"generation_kwargs: do_sample={is_sampled} {shown}: only greedy decoding is "
                "supported; pass --gen_kwargs=do_sample=False,temperature=0"
            )
        other = {name: value for name, value in left.items() if value != 1}  # 1 beam, penalty 1
        if other:
            name, value = next(iter(other.items()))
            raise ConfigError(
                f"generation_kwargs: {name}={value!r}: not supported; known are until, "
                f"{', '.join(_MAX_TOKENS)} and do_sample"
            )
        max_tokens = int(counts[0]) if counts else _DEFAULT_MAX_TOKENS
        if max_tokens < 1:
            raise ConfigError(f"generation_kwargs: max_gen_toks={max_tokens}: must be at least 1")
        return cls(tuple(text for text in until if text), max_tokens)
