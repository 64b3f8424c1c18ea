"""Tokenizers: text to integers and back."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict

from sparseformer_jax.checks import ConfigError

if TYPE_CHECKING:  # an extra, imported where it is needed
    import tokenizers


@runtime_checkable
class Tokenizer(Protocol):
    """Maps text to token ids below `vocab_size`, and back.

    Attributes:
      vocab_size: Number of ids.
      bos_id: Id that begins a document, if any; `encode` never adds it.
      eos_id: Id that ends a document, if any; `encode` never adds it.
      stop_ids: Ids that end a continuation, `eos_id` among them.
      fingerprint: Equal for tokenizers that encode every text alike.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    fingerprint: str

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Returns the ids of `text`, without any that begin or end a document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        """Returns the ids of each text, as `encode` does, computed on all cores."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ...


_BYTE_SPECIAL = {"<bos>": 256, "<eos>": 257}


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then `<bos>` 256 and `<eos>` 257.

    Args:
      bos_token: "<bos>", or "" for documents without one.
      eos_token: "<eos>", or "" for documents without one.
      stop_tokens: Others that end a continuation: "<bos>", or none.

    Raises:
      ConfigError: another token is named.
    """

    vocab_size = 258
    fingerprint = "bytes"

    def __init__(
        self, bos_token: str = "<bos>", eos_token: str = "<eos>", stop_tokens: Sequence[str] = ()
    ) -> None:
        find = _BYTE_SPECIAL.get
        self.bos_id = _special_id("data.bos_token", bos_token, find)
        self.eos_id = _special_id("data.eos_token", eos_token, find)
        self.stop_ids = _stop_ids(self.eos_id, stop_tokens, find)

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Returns the UTF-8 bytes of `text`."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        """Returns the UTF-8 bytes of each text; one core copies as fast as memory allows."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; `<bos>` and `<eos>` are written out.

        Raises:
          ValueError: an id is not below `vocab_size`.
        """
        names = {number: name.encode() for name, number in _BYTE_SPECIAL.items()}
        pieces = [names.get(int(i)) or bytes([i]) for i in ids]
        return b"".join(pieces).decode(errors="replace")


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`.

    Special tokens that stand in a text are encoded as such, as transformers does.

    Args:
      path: The file.
      bos_token: Name of the token that begins a document, or "".
      eos_token: Name of the token that ends a document, or "".
      stop_tokens: Names of others that end a continuation.

    Raises:
      ConfigError: `path` cannot be read, a token is not in it, or the `tokenizers`
        package is not installed.
    """

    def __init__(
        self, path: str, bos_token: str = "", eos_token: str = "", stop_tokens: Sequence[str] = ()
    ) -> None:
        content = _read(path)
        self._tokenizer = _parse(path, content)
        # The file may hold a length to cut or fill every text to.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        find = self._tokenizer.token_to_id
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.bos_id = _special_id("data.bos_token", bos_token, find)
        self.eos_id = _special_id("data.eos_token", eos_token, find)
        self.stop_ids = _stop_ids(self.eos_id, stop_tokens, find)
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Returns the ids of `text`."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        """Returns the ids of each text, computed on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`, special tokens written out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def make_tokenizer(data: ConfigDict) -> Tokenizer:
    """Returns the tokenizer that `data`, a config's data section, describes.

    Raises:
      ConfigError: as the tokenizers say.
    """
    special = (data.bos_token, data.eos_token, data.stop_tokens)
    if data.tokenizer == "bytes":
        return ByteTokenizer(*special)
    return HuggingFaceTokenizer(data.tokenizer, *special)


def _special_id(field: str, token: str, find: Callable[[str], int | None]) -> int | None:
    if not token:
        return None
    number = find(token)
    if number is None:
        raise ConfigError(
            f"{field}={token!r}: the tokenizer has no such token; name one that it has,"
            " or leave the field empty"
        )
    return number


def _stop_ids(
    eos_id: int | None, tokens: Sequence[str], find: Callable[[str], int | None]
) -> frozenset[int]:
    ids = [eos_id, *(_special_id("data.stop_tokens", token, find) for token in tokens)]
    return frozenset(number for number in ids if number is not None)


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={path!r}: neither 'bytes' nor a readable tokenizer.json"
            f" ({error.strerror})"
        ) from error


def _parse(path: str, content: bytes) -> "tokenizers.Tokenizer":
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer={path!r} needs the tokenizers package:"
            ' pip install "sparseformer_jax[hf]"'
        ) from error
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing narrower
        raise ConfigError(
            f"data.tokenizer={path!r} is no Hugging Face tokenizer.json: {error}"
        ) from error
