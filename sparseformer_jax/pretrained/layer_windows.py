"""Which layers of a pretrained model attend in a window: an attention section, and back."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from sparseformer_jax import registry
from sparseformer_jax.pretrained.fields import Fields

_KINDS = ("full_attention", "sliding_attention")


def attention_section(window: int | None, full_layers: Sequence[int]) -> ConfigDict:
    """Returns the attention of layers that see the last `window` tokens, but for the full ones.

    Args:
      window: tokens, the query's own included; None: all layers are full.
      full_layers: which attend to everything.
    """
    if window is None:
        return registry.method_config("attention", "dense")
    chosen = {"full_layers": tuple(full_layers)} if full_layers else {"num_full_layers": 0}
    return registry.method_config(
        "attention", "masformer", span="window", span_size=window, **chosen
    )


def read_windows(config: ConfigDict) -> tuple[int | None, tuple[int, ...]]:
    """Returns the window and the full layers of a config's attention.

    Raises:
      ValueError: it attends in any other way.
    """
    section, num_layers = config.attention, config.model.num_layers
    if section.name == "dense":
        return None, tuple(range(num_layers))
    if section.name != "masformer" or section.span != "window":
        span = f" with span={section.span!r}" if section.name == "masformer" else ""
        raise ValueError(f"attention.name={section.name!r}{span} is neither dense nor a window")
    options = registry.options("attention", section)
    full = tuple(sorted(options.full))
    return (None if len(full) == num_layers else section.span_size), full


def layers_by_type(fields: Fields, num_layers: int, default: Sequence[int]) -> tuple[int, ...]:
    """Returns the full layers that `layer_types` names; the default where it is absent.

    Raises:
      ConfigError: it is no list of two known types, one a layer.
    """
    types = fields.get("layer_types", list, None)
    if types is None:
        return tuple(default)
    if len(types) != num_layers or not all(kind in _KINDS for kind in types):
        known = " or ".join(_KINDS)
        raise fields.refuse("layer_types", f"must be {num_layers} times {known}")
    return tuple(index for index, kind in enumerate(types) if kind == "full_attention")


def layer_types(config: ConfigDict, full_layers: Sequence[int]) -> list[str]:
    """Returns `layer_types` of config.json."""
    layers = range(config.model.num_layers)
    return [_KINDS[0] if layer in full_layers else _KINDS[1] for layer in layers]
