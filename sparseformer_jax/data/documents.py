"""Reads the documents of a text file, piece by piece: the file itself, or its JSON lines."""

import gzip
import io
import json
import lzma
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.files import TextFile
from sparseformer_jax.data.pieces import Piece, cut


def read_documents(file: TextFile, text_field: str, bar: tqdm | None = None) -> Iterator[Piece]:
    """Yields the documents of `file` in UTF-8, byte for byte, in pieces.

    Python source in another encoding than UTF-8 is converted from the one that it
    declares (PEP 263).

    Args:
      file: What to read.
      text_field: Field of a JSON line that holds its text.
      bar: Is moved by the bytes read, as they are stored.

    Raises:
      ConfigError: the file cannot be read, is damaged or not UTF-8, or a line is no JSON
        object with such a text.
    """
    try:
        with file.path.open("rb") as stored, _decompressed(file, stored) as stream:
            position = 0
            for piece in _documents(stream, file, text_field):
                if bar is not None:
                    bar.update(stored.tell() - position)
                    position = stored.tell()
                yield piece
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"data.files: {str(file.path)!r} is damaged: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"data.files: {str(file.path)!r} cannot be read ({error.strerror})"
        ) from error


def _decompressed(file: TextFile, stored: io.BufferedReader) -> io.BufferedIOBase:
    match file.compression:
        case ".gz":
            return gzip.GzipFile(fileobj=stored)
        case ".xz":
            return lzma.LZMAFile(stored)
        case _:
            return stored


def _documents(stream: io.BufferedIOBase, file: TextFile, text_field: str) -> Iterator[Piece]:
    match file.kind:
        case ".jsonl":
            return _read_json_lines(stream, file.path, text_field)
        case ".py":
            return _read_python(stream, file.path)
        case _:
            return _checked(cut(stream), file.path)


def _read_python(stream: io.BufferedIOBase, path: Path) -> Iterator[Piece]:
    content = stream.read()
    encoding = "utf-8"
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return cut(io.BytesIO(content.decode(encoding).encode()))
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise _not_text(path, encoding, error) from error


def _checked(pieces: Iterable[Piece], path: Path) -> Iterator[Piece]:
    for piece in pieces:
        try:
            piece.text.decode()
        except UnicodeError as error:
            raise _not_text(path, "utf-8", error) from error
        yield piece


def _not_text(path: Path, encoding: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"data.files: {str(path)!r} is not {encoding} text ({error}); convert it to UTF-8"
        " or leave it out"
    )


def _read_json_lines(lines: Iterable[bytes], path: Path, text_field: str) -> Iterator[Piece]:
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
        yield from cut(io.BytesIO(document))


def _describe(record: object) -> str:
    if not isinstance(record, dict):
        return "it is no JSON object"
    texts = [name for name, value in record.items() if isinstance(value, str)]
    return f"it has {', '.join(texts)}" if texts else "it has no text at all"
