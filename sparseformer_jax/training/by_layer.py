"""Diagnostics that methods want to be seen layer by layer, beside their means."""

from collections.abc import Mapping
from typing import Any

from sparseformer_jax.model.transformer import Transformer


def without_layers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns numbers by name for a person to read: those of single layers stay in files."""
    return {name: value for name, value in numbers.items() if "/layer_" not in name}


class ByLayer:
    """Which diagnostics those are, and of which layers.

    Args:
      model: arrays or shapes.
    """

    def __init__(self, model: Transformer) -> None:
        self._layers: dict[str, list[int]] = {}
        for number, attention in enumerate(model.attention_layers()):
            for name in sorted(attention.by_layer):
                self._layers.setdefault(name, []).append(number)

    def chosen(self, diagnostics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns, of a model's diagnostics, one number for each layer that reports it."""
        return {name: diagnostics[name] for name in self._layers if name in diagnostics}

    def named(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Returns what `chosen` did as numbers by name and layer, "recall/layer_3"."""
        return {
            f"{name}/layer_{number}": float(value)
            for name, layers in values.items()
            for number, value in zip(self._layers[name], layers, strict=True)
        }
