"""What a pretrained model is read from, whatever its files look like."""

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from sparseformer_jax.pretrained.fields import Fields

# Whose names tensors go by.
Naming = Literal["hugging_face", "gguf"]


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer, and what its model expects around a document.

    Attributes:
      json: content of a Hugging Face tokenizer.json.
      bos_token: begins a document, or "".
      eos_token: ends a document, or "".
      stop_tokens: others that end a continuation, as those that end a turn of a chat.
    """

    json: bytes
    bos_token: str
    eos_token: str
    stop_tokens: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A pretrained model on disk.

    Attributes:
      where: names it in messages.
      naming: whose names its tensors go by.
      architecture: what the files call it.
      fields: its settings, by the names of transformers' config.json.
      shapes: of its tensors, by name.
    """

    where: str
    naming: Naming
    architecture: str
    fields: Fields
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor of floating-point numbers.

        Raises:
          ConfigError: it is of a type that holds none.
        """
        ...

    def tokenizer(self) -> PretrainedTokenizer:
        """Returns the tokenizer.

        Raises:
          ConfigError: there is none, or none that can be understood.
        """
        ...


def as_object(value: Any) -> dict[str, Any]:
    """Returns a JSON object; raises TypeError for any other value."""
    if not isinstance(value, dict):
        raise TypeError(f"must be an object, not {type(value).__name__}")
    return value
