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


def test_cache_root(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_root("") == Path("/var/caches/sparseformer_jax")
    assert cache_root("/elsewhere") == Path("/elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root("") == Path.home() / ".cache/sparseformer_jax"
