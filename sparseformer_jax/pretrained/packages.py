"""Packages of the extra `pretrained`, imported where they are needed."""

import importlib
from typing import Any

from sparseformer_jax.checks import ConfigError


def optional(name: str) -> Any:
    """Returns a module; raises ConfigError, with the way to install it, if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f'this needs the package {package}: pip install "sparseformer_jax[pretrained]"'
        ) from error
