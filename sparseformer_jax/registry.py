"""Methods by name: a method's name is its module's name, so there is no list to edit.

A method module has a frozen dataclass `Options`, its hyper-parameters with
defaults, and a class `Method`. It may have `check(options, config) -> None`, which
raises ValueError where the options and the rest of the config do not fit,
`notes(options) -> list[str]`, which returns what a run says of them as it starts,
`sweep(options, seq_len) -> list[dict[str, Any]]`, which returns options to draw perplexity over
density with, and
`adopt(other, num_layers) -> dict[str, Any]`, which returns options that follow from those of
the run in `init_from` whose settings a run takes, and raises ValueError where they do not fit.
"""

import dataclasses
import importlib
import pkgutil
import types
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sparseformer_jax.checks import ConfigError, check_choice, convert, suggest
from sparseformer_jax.config_ranges import check_option

KINDS = ("attention", "sparsity")

# What the methods of a folder share; not a method.
_SHARED_MODULES = {
    "attention": ("base", "inputs"),
    "sparsity": (
        "base",
        "calibration",
        "layers",
        "nm",
        "one_shot",
        "packing",
        "report",
        "targets",
        "workdirs",
    ),
}


def names(kind: str) -> tuple[str, ...]:
    """Returns the names of all methods of a kind, sorted.

    Raises ConfigError if there is no such kind.
    """
    check_choice("kind of method", kind, KINDS)
    package = importlib.import_module(f"sparseformer_jax.{kind}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(
        sorted(n for n in found if n not in _SHARED_MODULES[kind] and not n.startswith("_"))
    )


def method(kind: str, name: str) -> types.ModuleType:
    """Returns the module of the method `name` of a kind, imported on demand.

    Raises ConfigError, with the nearest name, if there is none.
    """
    check_choice(f"{kind}.name", name, names(kind))
    return importlib.import_module(f"sparseformer_jax.{kind}.{name}")


def options(kind: str, section: ConfigDict) -> Any:
    """Returns the `Options` of the method named in a config section {name, **options}.

    An option that the section leaves out keeps its default. Raises ConfigError for
    an unknown option, a wrong type and whatever `Options` itself refuses.
    """
    cls = method(kind, section.name).Options
    annotations = _annotations(cls)
    values = {}
    for key, value in section.items():
        if key == "name":
            continue
        if key not in annotations:
            raise ConfigError(
                f"{kind}.{key}={value!r}: not an option of {section.name}"
                f"{suggest(key, annotations)}"
            )
        values[key] = convert(f"{kind}.{key}", value, annotations[key])
        check_option(f"{kind}.{key}", values[key])
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{kind}.{error}") from error


def notes(kind: str, section: ConfigDict) -> list[str]:
    """Returns what the method named in a config section has to say of its options."""
    told = getattr(method(kind, section.name), "notes", None)
    return [] if told is None else told(options(kind, section))


def sweep(kind: str, section: ConfigDict, seq_len: int) -> list[dict[str, Any]]:
    """Returns the options of other densities that the method named in a config section offers."""
    offered = getattr(method(kind, section.name), "sweep", None)
    return [] if offered is None else offered(options(kind, section), seq_len)


def adopt(kind: str, section: ConfigDict, other: ConfigDict, num_layers: int) -> None:
    """Changes the options in a config section that follow from those of another run.

    Raises ConfigError if the method cannot start from that run's.
    """
    adopted = getattr(method(kind, section.name), "adopt", None)
    if adopted is None:
        return
    try:
        section.update(adopted(options(kind, other), num_layers))
    except ValueError as error:
        raise ConfigError(f"{kind}.name={section.name!r}: {error}") from None


def method_config(kind: str, name: str, **overrides: Any) -> ConfigDict:
    """Returns a config section: the method's name and all its options with defaults.

    Every option is present, so each can be overridden on the command line.
    `overrides` replace defaults. Raises ConfigError as `options` does.
    """
    chosen = options(kind, ConfigDict({"name": name, **overrides}))
    section = ConfigDict({"name": name})
    for key, annotation in _annotations(type(chosen)).items():
        value = getattr(chosen, key)
        section[key] = _placeholder(annotation) if value is None else value
    return section


def _annotations(options_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(options_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(options_class)}


def _placeholder(annotation: Any) -> Any:
    """Returns a field that holds None now and a value of the annotated type later."""
    members = typing.get_args(annotation)
    (member,) = (member for member in members if member is not types.NoneType)
    return placeholder(typing.get_origin(member) or member)
