import gzip
import json
import lzma

import pytest

from sparseformer_jax.data.documents import read_documents
from sparseformer_jax.data.files import find_files

PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def read(path, content, text_field="text"):
    path.write_bytes(content)
    pieces = list(read_documents(*find_files([str(path)]), text_field))
    assert all(piece.begins for piece in pieces)
    return [piece.text for piece in pieces]


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind", [".txt", ".md", ".py"])
def test_a_file_is_a_document_byte_for_byte(tmp_path, kind, compression):
    content = "\ufeffé\r\n日本\n\n".encode() if kind != ".py" else "é\r\n".encode()
    path = tmp_path / f"a{kind}{compression}"
    assert read(path, PACK[compression](content)) == [content]


@pytest.mark.parametrize("compression", PACK)
def test_a_json_line_is_a_document(tmp_path, compression):
    texts = ["one\n", "", "zwölf 🙂"]
    lines = "\n".join(json.dumps({"id": 1, "body": text}) for text in texts) + "\n\n"
    path = tmp_path / f"a.jsonl{compression}"
    documents = read(path, PACK[compression](lines.encode()), text_field="body")
    assert documents == [text.encode() for text in texts]


@pytest.mark.parametrize("codec", ["latin-1", "utf-8-sig"])
def test_python_source_declares_its_encoding(tmp_path, codec):
    text = f"# coding: {codec}\nname = 'é'\n"
    assert read(tmp_path / "a.py", text.encode(codec)) == [text.encode()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff", "a.txt' is not utf-8 text .*; convert it to UTF-8"),
        ("a.py", b"\xff", "a.py' is not utf-8 text"),
        ("a.py", b"# coding: klingon\n", "a.py' is not utf-8 text .*klingon"),
        ("a.py", b"# coding: hex\n00", "a.py' is not hex text"),
        ("a.txt.gz", b"no gzip", "a.txt.gz' is damaged"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz' is damaged"),
        ("a.txt.xz", b"no xz", "a.txt.xz' is damaged"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], "a.txt.xz' is damaged"),
        ("a.jsonl", b'{"text": ""}\n{', "a.jsonl', line 2, is not JSON in UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl', line 1, is not JSON in UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl', line 1, is not JSON in UTF-8"),
        ("a.jsonl", b'"text"', "a.jsonl', line 1, has no such text; it is no JSON"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl', line 1, has no such text; it has no"),
        (
            "a.jsonl",
            b'{"body": "", "n": 1, "title": ""}',
            "data.text_field='text': .*line 1, has no such text; it has body, title",
        ),
    ],
)
def test_mistakes(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name, content)
    assert "\n" not in str(error.value)
