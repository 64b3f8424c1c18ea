import functools
import io
import json
import re

import pytest

from sparseformer_jax.data import ByteTokenizer, load_corpus, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def written(data, tmp_path, monkeypatch):
    """What a terminal or another stream gets while a corpus of 900 bytes is prepared."""

    def prepare(stream):
        monkeypatch.setattr("sys.stderr", stream)
        lines = [json.dumps({"text": "x" * 18}) + "\n"] * 30
        (tmp_path / "train.jsonl").write_text("".join(lines))
        data.files = (str(tmp_path / "train.jsonl"),)
        load_corpus(data, "train", ByteTokenizer())
        return stream.getvalue()

    return prepare


def test_a_terminal_sees_bars_with_their_totals(written, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0)
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, mininterval=0))
    bars = re.findall(r"(\w[\w ]*): +(\d+)%.*?/(\S+) \[", written(Terminal()))
    assert list(dict.fromkeys(name for name, _, _ in bars)) == [
        "hashing",
        "preparing",
        "tokenising train",
    ]
    totals = {name: total for name, _, total in bars}
    assert totals["hashing"] == totals["preparing"] == "930"
    for name in totals:
        assert max(int(percent) for bar, percent, _ in bars if bar == name) == 100


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_is_seen_of_what_is_quick_or_redirected(written, monkeypatch, stream):
    if stream is io.StringIO:
        monkeypatch.setattr(progress, "_DELAY", 0)
    assert written(stream()) == ""
