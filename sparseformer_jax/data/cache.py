"""Folders that are computed once and appear complete or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root(cache_dir: str) -> Path:
    """Returns the folder of prepared text and tokens, `data.cache_dir`.

    Without one: sparseformer_jax in $XDG_CACHE_HOME, or in ~/.cache.
    """
    if cache_dir:
        return Path(cache_dir).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "sparseformer_jax"


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`; where it does not exist, `build` fills it first.

    `build` gets a temporary folder beside it, renamed when done, so an interrupted
    build leaves nothing by that name. Of processes that build at once, the first to
    finish wins, and the others, which made the same, take its result.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}.incomplete-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        # A folder inside: the temporary one is readable by its owner alone.
        unfinished = Path(scratch) / "unfinished"
        unfinished.mkdir()
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return folder
