"""One writer a workdir: a lock that the kernel releases when its holder ends, however it ends."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from sparseformer_jax.checks import ConfigError

FILE = ".lock"


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds `workdir/.lock`, so that no other process writes checkpoints there meanwhile.

    flock(2): readers need none and are not kept out. NFS turns it into a lock that other
    hosts see. Where the file system knows no locks, a line on stderr says so.

    Raises:
      ConfigError: another process holds it; the error names that process.
    """
    descriptor = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, workdir)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, workdir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"--workdir={workdir}: {_holder(descriptor)} trains there; wait for its end, or take "
            "another --workdir"
        ) from None
    except OSError as error:
        print(
            f"--workdir={workdir}: its file system has no locks ({error.strerror}); "
            "let no other run write there",
            file=sys.stderr,
        )


def _holder(descriptor: int) -> str:
    """Names the process that holds the lock; it may be about to write who it is."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"
