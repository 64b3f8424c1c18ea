import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseformer_jax.data.cache import built_once, cache_root


def test_builds_once(tmp_path):
    folder = tmp_path / "deep" / "folder"
    built_once(folder, lambda path: (path / "a").touch())
    built_once(folder, lambda path: pytest.fail("built twice"))
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupted(path):
        (path / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built_once(tmp_path / "folder", interrupted)
    assert not list(tmp_path.iterdir())


def test_the_first_of_two_builds_wins(tmp_path):
    folder = tmp_path / "folder"

    def slow(path):
        built_once(folder, lambda other: (other / "quick").touch())
        (path / "slow").touch()

    built_once(folder, slow)
    assert [path.name for path in folder.iterdir()] == ["quick"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_build_left_is_removed(tmp_path):
    """A process that is killed while it builds, and one that still builds."""
    program = f"""
import os, pathlib
from sparseformer_jax.data.cache import built_once
def killed(folder):
    (folder / "half").touch()
    os.kill(os.getpid(), 9)
built_once(pathlib.Path({str(tmp_path / "other")!r}), killed)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60)
    assert len(list(tmp_path.glob("other.incomplete-*/unfinished/half"))) == 1

    def slow(path):
        built_once(tmp_path / "quick", lambda other: (other / "a").touch())
        (path / "b").touch()

    built_once(tmp_path / "slow", slow)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quick", "slow"]
    assert (tmp_path / "slow" / "b").exists()


def test_a_folder_taken_for_abandoned_is_made_again(tmp_path, monkeypatch):
    """Another process removes it between its making and its locking."""
    flock, taken = fcntl.flock, []

    def late(lock, operation):
        if not taken:
            (scratch,) = tmp_path.glob("*.incomplete-*")
            (scratch / "lock").unlink()
            scratch.rmdir()
            taken.append(scratch)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    built_once(tmp_path / "folder", lambda path: (path / "a").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert taken


@pytest.mark.parametrize("name", ["file", "file/deep/cache"])
def test_not_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match="^data.cache_dir: cannot write to .*; free space"
    ) as error:
        built_once(tmp_path / name / "a", lambda path: None)
    assert "\n" not in str(error.value)


def test_cache_root(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_root("") == Path("/var/caches/sparseformer_jax")
    assert cache_root("/elsewhere") == Path("/elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root("") == Path.home() / ".cache/sparseformer_jax"
