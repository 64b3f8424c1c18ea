import os
import socket

import pytest

from sparseformer_jax.data.files import find_files


def write(folder, *names, content="x"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def found(folder, *patterns):
    files = find_files([str(folder / pattern) for pattern in patterns])
    return sorted(str(file.path.relative_to(folder)) for file in files)


def test_a_folder_stands_for_the_text_below_it(tmp_path):
    write(tmp_path, "a.txt", "b/c.MD", "b/d.jsonl.gz", "e.py.xz")
    write(tmp_path, "image.png", "b/f.tar.gz", ".hidden.txt", ".venv/g.py")
    assert found(tmp_path, "") == ["a.txt", "b/c.MD", "b/d.jsonl.gz", "e.py.xz"]


def test_globs_and_repeated_names(tmp_path):
    write(tmp_path, "a.txt", "b/c.txt", "b/d.md", "[odd].txt")
    assert found(tmp_path, "**/*.txt", "a.txt") == ["[odd].txt", "a.txt", "b/c.txt"]
    assert found(tmp_path, "[odd].txt") == ["[odd].txt"]
    assert found(tmp_path, "b*") == ["b/c.txt", "b/d.md"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("Valid.txt.xz", "validation"),
        ("val.jsonl", "validation"),
        ("dev_1.jsonl.gz", "validation"),
        ("validation.txt", "validation"),
        ("train-00000-of-00008.jsonl.xz", "train"),
        ("test.txt", "test"),
        ("test.py", None),
        ("train.md", None),
        ("training.txt", None),
        ("latest.txt", None),
    ],
)
def test_splits_that_names_tell(tmp_path, name, split):
    write(tmp_path, name)
    assert find_files([str(tmp_path)])[0].split == split


def test_standard_library_is_the_default():
    paths = [file.path for file in find_files(())]
    assert {"argparse.py", "decoder.py"} <= {path.name for path in paths}
    assert all(path.suffix == ".py" for path in paths)
    assert not [p for p in paths if {"site-packages", "test"} & set(p.parts)]


@pytest.mark.parametrize(
    ("names", "patterns", "message"),
    [
        ([], ["no.txt"], r"data.files: '.*no.txt' names no text; give"),
        ([], ["*.txt"], r"data.files: '.*\*.txt' names no text; give"),
        (["a.png"], [""], "names no text; give"),
        (["a.csv"], ["a.csv"], r"'.*a.csv' is of an unknown kind; known: .txt .py"),
        (
            ["train.txt", "b.txt"],
            [""],
            r"'.*train.txt' names a split and '.*b.txt' does not; take .*--config.data.files=/\S*train.txt, or",
        ),
    ],
)
def test_mistakes(tmp_path, names, patterns, message):
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=message) as error:
        found(tmp_path, *patterns)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["", "a.txt", "*.txt"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: os.symlink("nowhere", path), "is a link to nothing; remove it"),
        (lambda path: os.symlink(path, path), "is a link to nothing; remove it"),
        (os.mkfifo, "is a pipe, a socket or a device, no file; remove it"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(path), "is a pipe, a socket or"),
    ],
    ids=["link", "loop", "pipe", "socket"],
)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_what_is_no_file(tmp_path, monkeypatch, make, message, pattern):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "b.txt")
    make("a.txt")
    with pytest.raises(ValueError, match=f"^data.files: '.*a.txt' {message}") as error:
        found(tmp_path, pattern)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder)))
        return iter(())

    monkeypatch.setattr(os, "walk", refused)
    with pytest.raises(ValueError, match="^data.files: .* cannot be read .Permission denied"):
        found(tmp_path, "")


def test_no_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="data.files is empty, and this Python has no"):
        find_files(())
