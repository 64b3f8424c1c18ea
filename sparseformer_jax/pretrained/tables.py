"""What a table of an architecture is made of: names, and the forms weights have elsewhere."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from ml_collections import ConfigDict

from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.source import Naming

Shape = tuple[int, ...]

_LAYER = re.compile(r"layers/(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A weight by its names here and elsewhere; {} stands for the number of its layer.

    Attributes:
      ours: the name by layer.
      hugging_face: in safetensors.
      gguf: in GGUF files; "" where the architecture has none.
      in_dims: of a matrix, the input dimensions in front here; transformers has it as
        [outputs, inputs]. None: it is the same there, but for several dimensions of a bias.
      gguf_form: what GGUF files change: "interleaved" rows, which Llama's converter makes of
        the two halves that rotate together, or "plus_one", a scale that is added to 1 elsewhere.
    """

    ours: str
    hugging_face: str
    gguf: str = ""
    in_dims: int | None = None
    gguf_form: Literal["same", "interleaved", "plus_one"] = "same"

    def name(self, naming: Naming, layer: str) -> str:
        """Returns the name elsewhere, in a layer."""
        pattern = self.gguf if naming == "gguf" else self.hugging_face
        return pattern.replace("{}", layer)

    def shape_elsewhere(self, shape: Shape) -> Shape:
        """Returns the shape elsewhere of what has this shape here."""
        if self.in_dims is not None:
            return (math.prod(shape[self.in_dims :]), math.prod(shape[: self.in_dims]))
        return shape if "table" in self.ours else (math.prod(shape),)

    def to_ours(self, array: np.ndarray, shape: Shape, naming: Naming) -> np.ndarray:
        """Returns a weight from elsewhere in the shape it has here, contiguous."""
        if naming == "gguf" and self.gguf_form == "interleaved":
            array = _halves(array, num_heads=shape[-2])
        if naming == "gguf" and self.gguf_form == "plus_one":
            array = array - 1
        if self.in_dims is not None:
            array = array.T
        return np.ascontiguousarray(array).reshape(shape)

    def to_hugging_face(self, array: np.ndarray) -> np.ndarray:
        """Returns a weight of ours as transformers has it, contiguous."""
        if self.in_dims is None:
            return np.ascontiguousarray(array).reshape(self.shape_elsewhere(array.shape))
        outputs, inputs = self.shape_elsewhere(array.shape)
        return np.ascontiguousarray(array.reshape(inputs, outputs).T)


def _halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes, in each head, the order 0, H/2, 1, H/2+1, .. of rows, in which pairs rotate."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of pretrained models.

    Attributes:
      model_type: what config.json calls it.
      class_name: of the language model in transformers.
      gguf: what GGUF files call it; "": there are none.
      table: its weights.
      read: sets model and attention of a config of ours by the settings of a file; raises
        ConfigError where one cannot be followed.
      write: returns the settings for config.json, or raises ValueError where a config has
        what this architecture has not.
      unused: patterns of tensors that files may hold and no model needs.
    """

    model_type: str
    class_name: str
    gguf: str
    table: tuple[Entry, ...]
    read: Callable[[Fields, ConfigDict], None]
    write: Callable[[ConfigDict], dict[str, Any]]
    unused: tuple[str, ...] = ()

    def is_unused(self, name: str) -> bool:
        """Returns whether a tensor of a file is none of the model's weights."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)

    def entries(self, names: Iterable[str]) -> dict[str, tuple[Entry, str]]:
        """Returns entry and layer of each of our names; those without an entry are left out."""
        table = {entry.ours: entry for entry in self.table}
        found = {}
        for name in names:
            match = _LAYER.fullmatch(name)
            pattern, layer = (f"layers/{{}}/{match[2]}", match[1]) if match else (name, "")
            if pattern in table:
                found[name] = (table[pattern], layer)
        return found


def with_form(table: Sequence[Entry], forms: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Returns a table with another `gguf_form` for entries whose names contain a key."""

    def formed(entry: Entry) -> Entry:
        own = [form for part, form in forms.items() if part in entry.ours]
        return dataclasses.replace(entry, gguf_form=own[0]) if own else entry

    return tuple(map(formed, table))
