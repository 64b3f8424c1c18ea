"""Folders that are computed once and appear complete or not at all."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sparseformer_jax.checks import ConfigError

_UNFINISHED = ".incomplete-"
_LOCK = "lock"


def cache_root(cache_dir: str) -> Path:
    """Returns the folder of prepared text and tokens, `data.cache_dir`.

    Without one: sparseformer_jax in $XDG_CACHE_HOME, or in ~/.cache.
    """
    if cache_dir:
        return Path(os.path.expanduser(cache_dir))
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(home)) / "sparseformer_jax"


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`; where it does not exist, `build` fills it first.

    `build` gets a temporary folder beside it, renamed when done, so an interrupted
    build leaves nothing by that name; what a killed process left is removed by the next
    build. Of processes that build at once, the first to finish wins, and the others,
    which made the same, take its result.

    Raises:
      ConfigError: the folder cannot be written, or the disk is full.
    """
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder.parent)
            with _scratch(folder) as unfinished:
                build(unfinished)
                _rename(unfinished, folder)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: cannot write to {str(folder.parent)!r}"
            f" ({error.strerror or error}); free space there or name another folder"
        ) from error
    return folder


def _rename(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():
            raise


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, locked while this process lives and removed after."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=folder.name + _UNFINISHED, dir=folder.parent))
        lock = _try_lock(scratch)
        if lock is not None:
            break
    try:
        # A folder inside: the temporary one is readable by its owner alone.
        unfinished = scratch / "unfinished"
        unfinished.mkdir()
        yield unfinished
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Removes what killed processes left: the kernel released their locks."""
    for scratch in parent.glob(f"*{_UNFINISHED}*"):
        lock = _try_lock(scratch)
        if lock is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _try_lock(scratch: Path) -> int | None:
    """Returns a file descriptor that holds the lock of a scratch folder, if it is free.

    A folder is made before it is locked, so that another process may take it for
    abandoned in between: it is ours only if it is still there under our lock.
    """
    try:
        lock = os.open(scratch / _LOCK, os.O_RDWR | os.O_CREAT)
    except OSError:  # removed, or another user's
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(scratch / _LOCK)):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
