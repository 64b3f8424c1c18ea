"""Folders that are there whole or not at all."""

import atexit
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparseformer_jax.checks import ConfigError


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`, which becomes it at the end, or goes on an error.

    Raises:
      ConfigError: there is something at that place, or nothing can be made there.
    """
    final = folder.absolute()
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ConfigError(f"{folder}: is there already; take a folder that is new or empty")
    unfinished = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        # Threads of a checkpoint that failed may write there once more.
        atexit.register(shutil.rmtree, unfinished, ignore_errors=True)
        raise
