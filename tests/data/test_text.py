import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from sparseformer_jax.data import text
from sparseformer_jax.data.files import SPLITS
from sparseformer_jax.data.text import make_text

DOCUMENTS = [f"document {i % 180}\n" for i in range(200)]  # 20 of them twice


@pytest.fixture
def many(data, tmp_path):
    """A config whose text is 200 documents in four files, with no splits told."""
    for i in range(4):
        lines = [json.dumps({"text": text}) for text in DOCUMENTS[i::4]]
        (tmp_path / f"part{i}.jsonl").write_text("\n".join(lines))
    data.files = tuple(str(tmp_path / f"part{i}.jsonl") for i in range(4))
    data.validation_fraction = data.test_fraction = 0.2
    return data


@pytest.fixture
def splits(joined):
    """Returns the documents of each split of a config."""

    def read(config):
        source = make_text(config)
        return {name: joined(source.documents(name)) for name in SPLITS}

    return read


def test_splits_are_disjoint_and_hold_everything(many, splits):
    found = splits(many)
    assert Counter(sum(found.values(), [])) == Counter(DOCUMENTS)
    assert not set(found["train"]) & set(found["validation"] + found["test"])
    assert not set(found["validation"]) & set(found["test"])
    assert [len(found[name]) for name in SPLITS] == [133, 37, 30]


def test_same_contents_elsewhere_give_the_same_bytes(many, tmp_path, splits):
    splits(many)
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    for i, path in enumerate(many.files):
        shutil.copy(path, elsewhere / f"{9 - i}.jsonl")
    kept = ("*.array*", "*.order.npy")
    first = {p.name: p.read_bytes() for k in kept for p in (tmp_path / "cache").rglob(k)}
    many.files = (str(elsewhere),)
    many.cache_dir = str(tmp_path / "second")
    splits(many)
    second = {p.name: p.read_bytes() for k in kept for p in (tmp_path / "second").rglob(k)}
    assert len(first) == 6
    assert first == second


def test_more_text_moves_no_document_to_another_split(many, splits):
    before = splits(many)
    many.files = many.files[:2]
    for name, documents in splits(many).items():
        assert set(documents) <= set(before[name])


def test_unchanged_text_is_prepared_once(many, monkeypatch, splits):
    before = splits(many)
    monkeypatch.setattr(text, "read_documents", lambda *_: pytest.fail("read again"))
    assert splits(many) == before


@pytest.mark.parametrize("change", ["file", "text_field", "validation_fraction"])
def test_changes_give_another_fingerprint(many, change):
    before = make_text(many).fingerprint
    if change == "file":
        with open(many.files[0], "a") as stream:
            stream.write("\n")
    else:
        many[change] = {"text_field": "body", "validation_fraction": 0.1}[change]
    assert make_text(many).fingerprint != before


def test_names_tell_splits(data, tmp_path, joined):
    (tmp_path / "valid.txt").write_text("v")
    (tmp_path / "test.txt").write_text("t")
    data.files = (str(tmp_path / "*.txt"),)
    source = make_text(data)
    assert joined(source.documents("validation")) == ["v"]
    assert joined(source.documents("test")) == ["t"]
    with pytest.raises(ValueError, match="split 'train', only in validation, test; add"):
        source.documents("train")


BOOK = "".join(f"line {i} of a book\n" for i in range(1000))


def test_one_document_is_cut_by_position(data, tmp_path, splits, capfd):
    (tmp_path / "book.txt").write_text(BOOK)
    data.files = (str(tmp_path / "book.txt"),)
    found = splits(data)
    assert "".join(text for name in SPLITS for text in found[name]) == BOOK
    assert [len(found[name]) for name in SPLITS] == [1, 1, 1]
    assert len(found["train"][0]) / len(BOOK) == pytest.approx(0.9, abs=0.01)
    said = capfd.readouterr().err
    assert said == (
        "data.files: too few documents for whole ones in every split; the end of the text is cut"
        " off: 5% for test and 5% for validation\n"
    )


def test_a_long_document_is_stored_in_pieces(data, tmp_path, splits, monkeypatch):
    monkeypatch.setattr("sparseformer_jax.data.pieces.PIECE_BYTES", 64)
    (tmp_path / "train.txt").write_text(BOOK)
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": BOOK[:100]}))
    (tmp_path / "test.txt").write_text("x")
    data.files = (str(tmp_path),)
    assert splits(data) == {"train": [BOOK], "validation": [BOOK[:100]], "test": ["x"]}
    assert sum(1 for _ in make_text(data).documents("train").pieces()) > len(BOOK) / 64


def test_files_are_read_once(many, splits, monkeypatch):
    read = []
    monkeypatch.setattr(
        text, "read_documents", lambda *a, f=text.read_documents: (read.append(a[0]), f(*a))[1]
    )
    for i, name in enumerate(("train", "valid", "test")):
        os.rename(many.files[i], os.path.join(os.path.dirname(many.files[i]), f"{name}.jsonl"))
    many.files = (os.path.dirname(many.files[0]) + "/[tv]*.jsonl",)
    splits(many)
    assert sorted(file.split for file in read) == ["test", "train", "validation"]


def test_a_compression_that_fails_is_told(data, tmp_path):
    """Also where the same bytes, as plain text, are prepared already."""
    (tmp_path / "train.txt").write_text("text")
    data.files = (str(tmp_path / "train.txt"),)
    make_text(data).documents("train")
    (tmp_path / "train.txt").rename(tmp_path / "train.txt.gz")
    data.files = (str(tmp_path / "train.txt.gz"),)
    with pytest.raises(ValueError, match="train.txt.gz' is damaged"):
        make_text(data).documents("train")


def test_a_file_that_changes_while_it_is_read(many, tmp_path):
    source = make_text(many)
    with open(many.files[0], "a") as stream:
        stream.write("\n")
    with pytest.raises(ValueError, match="part0.jsonl' changed while it was read; try again"):
        source.documents("train")
    assert not list((tmp_path / "cache" / "text").iterdir())


@pytest.mark.parametrize("limit", [0, 1000, 80_000])
def test_a_full_disk(data, tmp_path, limit):
    """A limit on the size of files stands for it: the same calls fail, in the same places."""
    (tmp_path / "train.txt").write_bytes(os.urandom(100_000).hex().encode())
    data.files = (str(tmp_path / "train.txt"),)
    source = make_text(data)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ValueError, match="^data.cache_dir: cannot write to ") as error:
            source.documents("train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "text").iterdir())
    source.documents("train")


def test_no_document_at_all(data, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    data.files = (str(tmp_path / "a.jsonl"),)
    with pytest.raises(ValueError, match="data.files: the files hold no document"):
        make_text(data).documents("train")


def test_a_mistake_in_a_file_leaves_nothing_behind(data, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad')
    data.files = (str(tmp_path / "a.jsonl"),)
    with pytest.raises(ValueError, match=r"^data.files: .*a.jsonl', line 2, is not"):
        make_text(data).documents("train")
    assert not list((tmp_path / "cache" / "text").iterdir())


def test_quiet_offline_and_without_tensorflow(tmp_path):
    (tmp_path / "train.txt").write_text("text")
    for library in ("tensorflow", "torch"):
        (tmp_path / f"{library}.py").write_text("raise AssertionError(__name__)")
    program = f"""
import socket
def connect(*_):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = connect
from sparseformer_jax import default_config
from sparseformer_jax.data import load_corpus, make_tokenizer, train_iterator
data = default_config.get_config().data
data.files = ({str(tmp_path / "train.txt")!r},)
data.cache_dir = {str(tmp_path / "cache")!r}
corpus = load_corpus(data, "train", make_tokenizer(data))
next(train_iterator(corpus, seq_len=2, batch_size=2, seed=0))  # and never closed
assert corpus.num_tokens == 6
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert not done.returncode
