import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from tensorflow_datasets.core import shuffle

from sparseformer_jax.data import text
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


def splits(config):
    source = make_text(config)
    return {name: list(source.documents(name)) for name in text.SPLITS}


def test_splits_are_disjoint_and_hold_everything(many):
    found = splits(many)
    assert Counter(sum(found.values(), [])) == Counter(DOCUMENTS)
    assert not set(found["train"]) & set(found["validation"] + found["test"])
    assert not set(found["validation"]) & set(found["test"])
    assert [len(found[name]) for name in text.SPLITS] == [133, 37, 30]


def test_same_contents_elsewhere_give_the_same_bytes(many, tmp_path):
    splits(many)
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    for i, path in enumerate(many.files):
        shutil.copy(path, elsewhere / f"{9 - i}.jsonl")
    first = {p.name: p.read_bytes() for p in (tmp_path / "cache").rglob("*.array*")}
    many.files = (str(elsewhere),)
    many.cache_dir = str(tmp_path / "second")
    splits(many)
    second = {p.name: p.read_bytes() for p in (tmp_path / "second").rglob("*.array*")}
    assert len(first) == 3
    assert first == second


def test_more_text_moves_no_document_to_another_split(many):
    before = splits(many)
    many.files = many.files[:2]
    for name, documents in splits(many).items():
        assert set(documents) <= set(before[name])


def test_unchanged_text_is_prepared_once(many, monkeypatch):
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


def test_names_tell_splits(data, tmp_path):
    (tmp_path / "valid.txt").write_text("v")
    (tmp_path / "test.txt").write_text("t")
    data.files = (str(tmp_path / "*.txt"),)
    source = make_text(data)
    assert list(source.documents("validation")) == ["v"]
    assert list(source.documents("test")) == ["t"]
    with pytest.raises(ValueError, match="split 'train', only in validation, test; add"):
        source.documents("train")


def test_a_split_may_be_larger_than_tfds_buffers(many, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 100)
    assert len(make_text(many).documents("train")) == 133


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
