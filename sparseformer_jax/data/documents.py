"""Reads the documents of a text file: the whole file, or each line of JSON lines."""

import gzip
import io
import json
import lzma
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.files import TextFile


def read_documents(file: TextFile, text_field: str) -> Iterator[bytes]:
    """Yields the documents of `file` in UTF-8, byte for byte.

    Python source in another encoding than UTF-8 is converted from the one that it
    declares (PEP 263).

    Args:
      file: What to read.
      text_field: Field of a JSON line that holds its text.

    Raises:
      ConfigError: the file is damaged or not UTF-8, or a line is no JSON object with
        such a text.
    """
    try:
        with _open(file.path) as stream:
            if file.kind == ".jsonl":
                yield from _read_json_lines(stream, file.path, text_field)
            else:
                yield _read_text(stream, file)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"data.files: {str(file.path)!r} is damaged: {error}") from error


def _open(path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case _:
            return path.open("rb")


def _read_text(stream: io.BufferedIOBase, file: TextFile) -> bytes:
    content = stream.read()
    encoding = "utf-8"
    try:
        if file.kind == ".py":
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding).encode()
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise ConfigError(
            f"data.files: {str(file.path)!r} is not {encoding} text ({error});"
            " convert it to UTF-8 or leave it out"
        ) from error


def _read_json_lines(lines: Iterable[bytes], path: Path, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode())
            text = record.get(text_field) if isinstance(record, dict) else None
            # JSON can escape half a surrogate pair, which no encoding can hold.
            document = text.encode() if isinstance(text, str) else None
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"data.files: {str(path)!r}, line {number}, is not JSON in UTF-8: {error}"
            ) from error
        if document is None:
            raise ConfigError(
                f"data.text_field={text_field!r}: {str(path)!r}, line {number}, has no"
                f" such text; {_describe(record)}"
            )
        yield document


def _describe(record: object) -> str:
    if not isinstance(record, dict):
        return "it is no JSON object"
    texts = [name for name, value in record.items() if isinstance(value, str)]
    return f"it has {', '.join(texts)}" if texts else "it has no text at all"
