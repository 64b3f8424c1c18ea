"""Checks a whole config before anything is built, and compares and saves configs."""

import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sparseformer_jax import config_rules as rules
from sparseformer_jax import default_config, registry
from sparseformer_jax.checks import ConfigError as ConfigError
from sparseformer_jax.checks import convert, suggest
from sparseformer_jax.config_rules import resolve_mesh as resolve_mesh


def validate(
    config: ConfigDict,
    *,
    num_devices: int | None = None,
    num_processes: int | None = None,
) -> None:
    """Checks every key, type, value and combination of a config.

    The number of devices and processes are JAX's unless given. Raises ConfigError
    with one line, `field=value: what is wrong; the nearest name or the fix`.
    """
    # Late: a mistyped flag of a saved config is told without it.
    import jax

    num_devices = jax.device_count() if num_devices is None else num_devices
    num_processes = jax.process_count() if num_processes is None else num_processes
    _check_structure(config, default_config.get_config(), prefix="")
    values = flatten(config)
    rules.check_values(values)
    rules.check_model(values)
    rules.check_rotary(values)
    rules.check_start(values)
    rules.check_data(values)
    rules.check_steps(values)
    mesh = rules.resolve_mesh(config.mesh, num_devices)
    values.update({f"mesh.{axis}": size for axis, size in mesh.items()})
    rules.check_multiples(values, num_processes)
    _check_methods(config)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns all leaves of a config by dotted path, sorted within each section."""
    return dict(_leaves(config, prefix=""))


def diff(old: ConfigDict, new: ConfigDict) -> dict[str, str]:
    """Returns {"model.num_layers": "4 -> 6"} for each key that differs.

    A key that only one config has counts as its default, if it has one.
    """
    defaults = flatten(default_config.get_config())
    before, after = defaults | flatten(old), defaults | flatten(new)
    changes = {}
    for key in sorted(before | after):
        was, now = before.get(key, "absent"), after.get(key, "absent")
        if was != now:
            changes[key] = f"{was} -> {now}"
    return changes


def to_json(config: ConfigDict) -> str:
    """Returns a config as JSON text, from which `from_json` makes an equal one."""
    return json.dumps(_encode(config), indent=2)


def from_json(text: str | bytes) -> ConfigDict:
    """Returns the config that `to_json` wrote: same keys, types, tuples and Nones.

    Raises:
      ValueError: the text is cut, or no config.
    """
    try:
        config = _decode(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"is no config, or a damaged one ({error})") from None
    if not isinstance(config, ConfigDict):
        raise ValueError("is no config: it holds no keys")
    return config


def completed(config: ConfigDict) -> ConfigDict:
    """Adds the keys that are newer than a saved config, at their defaults; returns it."""
    _fill(config, default_config.get_config())
    return config


def _fill(config: ConfigDict, defaults: ConfigDict) -> None:
    for key, default in defaults.items():
        if key not in config:
            config[key] = placeholder(defaults.get_type(key)) if default is None else default
        elif isinstance(default, ConfigDict) and isinstance(config[key], ConfigDict):
            _fill(config[key], default)


def _leaves(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_structure(config: ConfigDict, reference: ConfigDict, prefix: str) -> None:
    """Refuses unknown and missing keys and wrong types, but leaves methods' options."""
    for key in config:
        if key not in reference:
            raise ConfigError(f"{prefix}{key}: no such key{suggest(key, reference)}")
    for key, default in reference.items():
        if key not in config:
            raise ConfigError(f"{prefix}{key}: missing; start from default_config")
        value = config[key]
        if not isinstance(default, ConfigDict):
            convert(f"{prefix}{key}", value, _annotation(reference, key))
        elif not isinstance(value, ConfigDict):
            raise ConfigError(f"{prefix}{key}={value!r}: must be a section of keys")
        elif key not in registry.KINDS:
            _check_structure(value, default, f"{prefix}{key}.")
        elif "name" not in value:
            raise ConfigError(f"{prefix}{key}.name: missing; it names the method")


_TUPLES_OF_INTS = ("profile_steps", "rope_local_layers")


def _annotation(reference: ConfigDict, key: str) -> Any:
    field_type = reference.get_type(key)
    if field_type is tuple:
        return tuple[int, ...] if key in _TUPLES_OF_INTS else tuple[str, ...]
    return field_type | None if reference[key] is None else field_type


def _check_methods(config: ConfigDict) -> None:
    for kind in registry.KINDS:
        chosen = registry.options(kind, config[kind])
        check = getattr(registry.method(kind, config[kind].name), "check", None)
        if check is None:
            continue
        try:
            check(chosen, config)
        except ValueError as error:
            raise ConfigError(f"{kind}.{error}") from error


_FIELD_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, tuple)}


def _encode(value: Any) -> Any:
    """JSON has neither tuples nor typed Nones: both are written as tagged objects."""
    if isinstance(value, ConfigDict):
        return {
            key: {"none": value.get_type(key).__name__}
            if value[key] is None
            else _encode(value[key])
            for key in value
        }
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    return value


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tuple"}:
        return tuple(_decode(item) for item in value["tuple"])
    if value.keys() == {"none"}:
        return placeholder(_FIELD_TYPES[value["none"]])
    return ConfigDict({key: _decode(item) for key, item in value.items()})
