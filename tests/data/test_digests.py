import errno
import hashlib
import os
import threading

import pytest

from sparseformer_jax.data import digests
from sparseformer_jax.data.digests import hash_files


@pytest.fixture
def files(tmp_path):
    """Two files, written an hour ago."""
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        write(path, path.name)
    return paths


@pytest.fixture
def read(monkeypatch):
    """The files that are read, in their order."""
    found = []
    compute = digests._digest
    monkeypatch.setattr(
        digests, "_digest", lambda path, *rest: (found.append(path), compute(path, *rest))[1]
    )
    return found


def write(path, text, seconds=3600):
    path.write_text(text)
    when = path.stat().st_mtime - seconds
    os.utime(path, (when, when))


def expected(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def found(paths, index):
    return [entry.digest for entry in hash_files(paths, index).values()]


def test_hashes_once(files, tmp_path, read):
    index = tmp_path / "cache" / "index"
    assert found(files, index) == expected(files)
    assert sorted(read) == files
    assert found(files, index) == expected(files)
    assert len(read) == 2
    assert os.listdir(index.parent) == ["index"]


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_a_changed_file_is_hashed_again(files, tmp_path, read, change):
    index = tmp_path / "index"
    found(files, index)
    before = files[0].stat()
    if change == "inode":
        other = tmp_path / "other"
        other.write_text("x")
        other.replace(files[0])
    else:
        files[0].write_text("longer" if change == "size" else "x")
    if change != "time":
        os.utime(files[0], ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert found(files, index) == expected(files)
    assert read[2:] == files[:1]


def test_a_file_just_written_is_hashed_again(files, tmp_path, read):
    """It may change again without another size or time."""
    write(files[0], "new", seconds=0)
    for _ in range(2):
        found(files, tmp_path / "index")
    assert read.count(files[0]) == 2
    assert read.count(files[1]) == 1


def test_several_sets_share_an_index(files, tmp_path, read):
    for path in (*files, *files):
        found([path], tmp_path / "index")
    assert read == files


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[1]", b'[["a", [1, 2], "x"]]', b"3"])
def test_a_damaged_index_is_written_anew(files, tmp_path, read, content):
    (tmp_path / "index").write_bytes(content)
    for _ in range(2):
        assert found(files, tmp_path / "index") == expected(files)
    assert len(read) == 2


def test_an_index_that_cannot_be_written_costs_only_time(files, tmp_path):
    (tmp_path / "file").touch()
    assert found(files, tmp_path / "file" / "index") == expected(files)


def test_an_error_does_not_wait_for_the_other_files(files, tmp_path, monkeypatch):
    """One file has no end; the other cannot be read."""

    begun = threading.Event()

    class Endless:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, size):
            if self.path == files[0]:
                begun.set()
                return b"x"
            begun.wait(10)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(type(files[0]), "open", lambda path, mode: Endless(path))
    with pytest.raises(ValueError, match="b' cannot be read .Input/output error"):
        digests._hash({path: digests.stamp(path) for path in reversed(files)})


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="^data.files: .*gone' cannot be read .No such file"):
        hash_files([tmp_path / "gone"], tmp_path / "index")
