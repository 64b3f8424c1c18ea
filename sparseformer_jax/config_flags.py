"""A config from the command line: `--config=FILE.py:ARG` and `--config.KEY=VALUE`.

The syntax is that of ml_collections.config_flags. Unlike there, a mistake is told in
one line, tuples need no quotes, None can be given, and an exception that a config file
raises keeps its own traceback.
"""

import ast
import inspect
import pathlib
import runpy
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sparseformer_jax.checks import ConfigError, suggest

_BOOLEANS = {"true": True, "false": False}


def load(file: str) -> ConfigDict:
    """Returns what `get_config()` in a config file makes; "FILE.py:ARG" passes ARG.

    Raises ConfigError if there is no such file or function, it is no Python, or ARG is not
    expected.
    """
    path, _, argument = file.partition(":")
    if not pathlib.Path(path).is_file():
        neighbours = (str(p) for p in pathlib.Path(path).parent.glob("*.py"))
        raise ConfigError(f"config={path}: no such file{suggest(path, neighbours)}")
    get_config = _run(path).get("get_config")
    if get_config is None:
        raise ConfigError(f"config={path}: the file defines no get_config()")
    arguments = (argument,) if argument else ()
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"config={file}: get_config(): {error}") from None
    config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"config={file}: get_config() returned {kind}, no ConfigDict")
    return config


def _run(path: str) -> dict[str, Any]:
    """Returns the names that a config file defines."""
    try:
        return runpy.run_path(path)
    except SyntaxError as error:
        where = f"line {error.lineno}: " if error.lineno else ""
        raise ConfigError(f"config={path}: {where}{error.msg}") from None
    except OSError as error:
        if error.filename != path:
            raise
        raise ConfigError(f"config={path}: {error.strerror}") from None


def keys(config: ConfigDict) -> dict[str, type]:
    """Returns the dotted path and the type of every key that can be overridden."""
    return dict(_leaf_types(config, prefix=""))


def override(config: ConfigDict, argv: list[str]) -> list[str]:
    """Sets keys of `config` from `--config.KEY=VALUE` and returns the other arguments.

    `argv` starts with the program's name, and so does the result. Raises absl's
    flags.Error, in one line, for an unknown key or a value of the wrong type.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()
    types = keys(config)
    for key, field_type in types.items():
        name, boolean = f"config.{key}", field_type is bool
        parser = _Parser(field_type)
        flag = flags.Flag(parser, None, name, None, "", boolean=boolean)
        flags.DEFINE_flag(flag, values)
    rest = values(argv)
    given = {key: values[f"config.{key}"] for key in types}
    config.update_from_flattened_dict(
        {
            # What is set to None keeps its type: it can be saved, and set again.
            key: placeholder(types[key]) if flag.value is None else flag.value
            for key, flag in given.items()
            if flag.present
        }
    )
    return rest


class _Parser(flags.ArgumentParser):
    """Reads a value of one type, or None."""

    def __init__(self, field_type: type) -> None:
        self._type = field_type

    def parse(self, argument: str) -> Any:
        if argument == "None":
            return None
        if self._type is tuple:
            return _parse_tuple(argument)
        try:
            if self._type is bool:
                return _BOOLEANS[argument.lower()]
            return self._type(argument)
        except (KeyError, ValueError):
            raise ValueError(f"must be {self._type.__name__}") from None


def _parse_tuple(text: str) -> tuple[Any, ...]:
    """Reads `10,12`, `(10, 12)`, `a,b` and, for a comma in a name, `"a,b"`."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = [item.strip() for item in text.split(",") if item.strip()]
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _leaf_types(config: ConfigDict, prefix: str) -> Iterator[tuple[str, type]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaf_types(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", config.get_type(key)
