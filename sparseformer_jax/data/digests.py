"""SHA-256 of files, each computed once as long as a file does not change."""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.progress import byte_bar

_BLOCK = 2**20

# A file that was written so shortly before it was hashed may change again within one tick
# of the file system's clock, which no stamp tells.
_SETTLED_NS = 2 * 10**9


class Stamp(NamedTuple):
    """What changes with a file's contents: its size, time of change and inode."""

    size: int
    mtime_ns: int
    inode: int


class Hashed(NamedTuple):
    """The SHA-256 of a file's bytes as they are stored, and its stamp before they were read."""

    stamp: Stamp
    digest: str


def stamp(path: Path) -> Stamp:
    """Returns the stamp of a file; raises ConfigError where there is none."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def hash_files(paths: Iterable[Path], index: Path) -> dict[Path, Hashed]:
    """Returns the digests of files, hashed on all cores.

    Args:
      paths: The files.
      index: JSON file of digests by path; one whose stamp still holds is taken, and new
        ones are added.

    Raises:
      ConfigError: a file cannot be read.
    """
    stamps = {path: stamp(path) for path in paths}
    known = _read_index(index)
    found = {path: known.get(os.path.abspath(path)) for path in stamps}
    hashed = {path: entry for path, entry in found.items() if entry and entry.stamp == stamps[path]}
    missing = {path: stamps[path] for path in stamps if path not in hashed}
    if missing:
        new = _hash(missing)
        hashed |= new
        _write_index(index, known, new)
    return {path: hashed[path] for path in stamps}


def _hash(stamps: Mapping[Path, Stamp]) -> dict[Path, Hashed]:
    total = sum(each.size for each in stamps.values())
    stop = threading.Event()
    with byte_bar("hashing", total) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            digests = list(pool.map(lambda path: _digest(path, bar, stop), stamps))
        finally:
            stop.set()  # an error or Ctrl-C does not wait for the other files
    return {
        path: Hashed(stamps[path], digest) for path, digest in zip(stamps, digests, strict=True)
    }


def _digest(path: Path, bar: tqdm, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while not stop.is_set() and (block := stream.read(_BLOCK)):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"data.files: {str(path)!r} cannot be read ({error.strerror})")


def _read_index(index: Path) -> dict[str, Hashed]:
    try:
        entries = json.loads(index.read_bytes())
        return {path: Hashed(Stamp(*numbers), digest) for path, (numbers, digest) in entries}
    except (OSError, ValueError, TypeError):
        return {}  # missing, or no index: all is hashed, and it is written anew


def _write_index(index: Path, known: Mapping[str, Hashed], new: Mapping[Path, Hashed]) -> None:
    settled = time.time_ns() - _SETTLED_NS
    entries = {path: entry for path, entry in known.items() if os.path.exists(path)}
    for path, entry in new.items():
        entries.pop(os.path.abspath(path), None)
        if entry.stamp.mtime_ns < settled:
            entries[os.path.abspath(path)] = entry
    # Where it cannot be written, the next start hashes again: a prepared cache may be read-only.
    with contextlib.suppress(OSError):
        index.parent.mkdir(parents=True, exist_ok=True)
        own = index.with_name(f"{index.name}.{os.getpid()}")
        own.write_text(json.dumps(list(entries.items())))
        own.replace(index)
