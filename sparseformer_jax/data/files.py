"""Finds the text files that `data.files` names, and the splits that they name."""

import dataclasses
import glob
import os
import re
import stat
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from sparseformer_jax.checks import ConfigError

SPLITS = ("train", "validation", "test")

_KINDS = (".txt", ".py", ".md", ".jsonl")
_COMPRESSIONS = (".gz", ".xz")
_ACCEPTED = f"{' '.join(_KINDS)}, also with {' or '.join(_COMPRESSIONS)}"

# A split's name, perhaps with the number of a shard: train-00000-of-00008.jsonl.
_SPLIT_STEM = re.compile(r"(train|validation|valid|val|dev|test)([-_.]?\d+(-of-\d+)?)?")

# Of the standard library: what pip installed there, and the test suites.
_NOT_STANDARD = ("site-packages", "dist-packages", "test", "tests", "idle_test")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text.

    Attributes:
      path: Where it lies.
      kind: Its suffix without that of the compression, which tells how to read it.
    """

    path: Path
    kind: str

    @property
    def split(self) -> str | None:
        """The split that the file's name tells, if any; `test.py` is only code."""
        stem = self.path.name.lower().rpartition(self.kind)[0]
        match = _SPLIT_STEM.fullmatch(stem)
        if match is None or self.kind not in (".txt", ".jsonl"):
            return None
        name = match[1]
        return "validation" if name in ("valid", "val", "dev") else name

    @property
    def compression(self) -> str:
        """The suffix of the compression, or ""."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in _COMPRESSIONS else ""


def find_files(patterns: Sequence[str]) -> list[TextFile]:
    """Returns the files that paths, folders and globs name, each file once.

    A folder stands for all text files below it that are not hidden; no patterns stand
    for the source of the running Python's standard library.

    Raises:
      ConfigError: a pattern names nothing, a file of unknown kind or what is no file at
        all (a dangling link, a pipe, a socket), or only some of the names tell a split.
    """
    if patterns:
        found = [file for pattern in patterns for file in _expand(pattern)]
    else:
        found = list(_standard_library())
    files = {os.path.abspath(file.path): file for file in found}.values()
    for file in files:
        _check_regular(file.path)
    _check_splits(files)
    return list(files)


def text_file(path: Path) -> TextFile:
    """Returns the file of a path, plain text where its name does not tell another kind."""
    return TextFile(path, _kind(path) or ".txt")


def _expand(pattern: str) -> list[TextFile]:
    path = os.path.expanduser(pattern)
    # What exists is no pattern, whatever characters it has.
    names = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
    files: list[TextFile] = []
    for match in map(Path, names):
        if os.path.isdir(match):
            files += _walk(match)
        elif kind := _kind(match):
            files.append(TextFile(match, kind))
        else:
            raise ConfigError(
                f"data.files: {str(match)!r} is of an unknown kind; known: {_ACCEPTED}"
            )
    if not files:
        raise ConfigError(
            f"data.files: {pattern!r} names no text; give an existing file, folder or"
            f" glob of {_ACCEPTED}"
        )
    return files


def _walk(folder: Path, leave_out: Collection[str] = ()) -> Iterator[TextFile]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [f for f in folders if f not in leave_out and f[0] != "."]
        for name in names:
            kind = _kind(Path(name))
            if kind and name[0] != ".":
                yield TextFile(Path(parent, name), kind)


def _raise(error: OSError) -> None:
    # os.walk passes over folders that it cannot read.
    raise ConfigError(
        f"data.files: {error.filename!r} cannot be read ({error.strerror})"
    ) from error


def _check_regular(path: Path) -> None:
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return
        reason = "is a pipe, a socket or a device, no file"
    except OSError as error:
        reason = "is a link to nothing" if path.is_symlink() else f"is out of reach: {error}"
    raise ConfigError(f"data.files: {str(path)!r} {reason}; remove it or name other files")


def _kind(path: Path) -> str | None:
    name = Path(path.name.lower())
    plain = name.with_suffix("") if name.suffix in _COMPRESSIONS else name
    return plain.suffix if plain.suffix in _KINDS else None


def _standard_library() -> Iterator[TextFile]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(folder, _NOT_STANDARD) if file.kind == ".py"]
    if not files:
        raise ConfigError(
            f"data.files is empty, and this Python has no source in {str(folder)!r}; name files"
        )
    yield from files


def _check_splits(files: Collection[TextFile]) -> None:
    told = [str(file.path) for file in files if file.split]
    untold = [str(file.path) for file in files if not file.split]
    if told and untold:
        raise ConfigError(
            f"data.files: {min(told)!r} names a split and {min(untold)!r} does not; take those"
            f" that do, --config.data.files={','.join(sorted(told)[:3])}{',...' * (len(told) > 3)},"
            " or rename the others"
        )
