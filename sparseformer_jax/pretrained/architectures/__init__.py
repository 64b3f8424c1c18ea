"""The architectures that come in and go out: a file a family, found by walking this folder.

A file has `ARCHITECTURES`, one or more of `sparseformer_jax.pretrained.tables.Architecture`.
"""

import functools
import importlib
import pkgutil

from sparseformer_jax.pretrained.tables import Architecture


@functools.cache
def known() -> tuple[Architecture, ...]:
    """Returns all architectures; a simpler one comes before one that is more general."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{n}") for n in names if not n.startswith("_")]
    return tuple(architecture for module in modules for architecture in module.ARCHITECTURES)
