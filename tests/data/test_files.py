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


def test_order_is_that_of_contents(tmp_path):
    for folder, names in (("1", "abc"), ("2", "cab")):
        for name, content in zip(names, "xyz", strict=True):
            write(tmp_path / folder, f"{name}.txt", content=content)
    first, second = (
        [file.digest for file in find_files([str(tmp_path / folder)])] for folder in ("1", "2")
    )
    assert first == second


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
        (["train.txt", "b.txt"], [""], "'.*train.txt' names a split and '.*b.txt'"),
    ],
)
def test_mistakes(tmp_path, names, patterns, message):
    write(tmp_path, *names)
    with pytest.raises(ValueError, match=message) as error:
        found(tmp_path, *patterns)
    assert "\n" not in str(error.value)


def test_no_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="data.files is empty, and this Python has no"):
        find_files(())
