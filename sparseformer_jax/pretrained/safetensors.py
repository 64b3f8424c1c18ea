"""Folders as transformers saves them: config.json, safetensors, tokenizer.json.

A safetensors file is the length of a header, the header in JSON, and the tensors, each at the
place that the header tells. They are memory-mapped, so nothing is read before it is asked for.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.packages import optional
from sparseformer_jax.pretrained.parts import Parts
from sparseformer_jax.pretrained.source import Naming, PretrainedTokenizer, as_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REASON = (
    "is a pickle, which can run any code when it is read; save the model as safetensors "
    "(transformers: model.save_pretrained(FOLDER))"
)

# As the safetensors library bounds it.
_MAX_HEADER = 100_000_000

_ITEM_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2}
_ITEM_SIZES |= {"F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}

_FLOATS: dict[str, Any] = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    num_bytes: int


class SafetensorsFile:
    """The tensors of one file, whose header is checked as a whole.

    Attributes:
      tensors: by name.

    Raises:
      ConfigError: the header is cut or no JSON, or a tensor does not lie where and as it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = Parts([path])
        self.tensors = self._header()

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, without a copy.

        Raises:
          ConfigError: it is of a type that holds no floating-point numbers.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in _FLOATS:
            known = ", ".join(_FLOATS)
            raise ConfigError(f"{self.path}: {name} is {tensor.dtype}; weights must be of {known}")
        raw = self._bytes.read(tensor.start, tensor.num_bytes)
        return raw.view(_FLOATS[tensor.dtype]).reshape(tensor.shape)

    def _header(self) -> dict[str, _Tensor]:
        size = self._bytes.size
        length = int(self._bytes.read(0, 8).view("<u8")[0]) if size >= 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise ConfigError(f"{self.path}: the header is cut, or this is no safetensors file")
        header = _load_json(self.path, self._bytes.read(8, length).tobytes(), "its header ")
        tensors = {
            name: self._tensor(name, entry, 8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end, before = 8 + length, "the header"
        for name in sorted(
            tensors, key=lambda name: (tensors[name].start, tensors[name].num_bytes)
        ):
            if tensors[name].start < end:
                raise ConfigError(f"{self.path}: {name} overlaps {before}")
            end, before = tensors[name].start + tensors[name].num_bytes, name
        return tensors

    def _tensor(self, name: str, entry: Any, data_start: int) -> _Tensor:
        def wrong(what: str) -> ConfigError:
            return ConfigError(f"{self.path}: {name}: {what}")

        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, end]
        except (KeyError, TypeError, ValueError):
            raise wrong("its entry in the header is no dtype, shape and data_offsets") from None
        if dtype not in _ITEM_SIZES:
            raise wrong(f"dtype={dtype!r} is unknown")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise wrong(f"shape={shape} and data_offsets={[start, end]} must be integers from 0")
        num_bytes = math.prod(shape) * _ITEM_SIZES[dtype]
        if end - start != num_bytes:
            raise wrong(
                f"data_offsets={[start, end]} do not hold {dtype}{shape}, {num_bytes} bytes"
            )
        if data_start + end > self._bytes.size:
            raise wrong(f"ends at byte {data_start + end} of a file of {self._bytes.size}")
        return _Tensor(dtype, tuple(shape), data_start + start, num_bytes)


class SafetensorsFolder:
    """A `Source` of a folder with config.json, safetensors and tokenizer.json.

    Raises:
      ConfigError: a file is missing, damaged, or a pickle.
    """

    naming: Naming = "hugging_face"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where = str(folder)
        files = _files(folder)
        config = _read_json(folder / "config.json")
        self.fields = Fields(config, str(folder / "config.json"))
        self.architecture: str = self.fields.get("model_type", str)
        self._files = {name: file for file in files for name in file.tensors}
        self.shapes = {name: file.tensors[name].shape for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor; `Source.read`."""
        return self._files[name].read(name)

    def tokenizer(self) -> PretrainedTokenizer:
        """Returns tokenizer.json, with the tokens that tokenizer_config.json puts around text."""
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{path}: missing; transformers writes it: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        content = path.read_bytes()
        _load_json(path, content)
        config_path = self._folder / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        bos, eos = (_token(config.get(name)) for name in ("bos_token", "eos_token"))
        tokenizer = _parsed(path, content)
        # An id that the tokenizer does not know is never chosen.
        names = {number: token for token, number in tokenizer.get_vocab().items()}
        stops = dict.fromkeys(names.get(number) for number in self._eos_ids())
        return PretrainedTokenizer(
            content,
            bos if _adds_bos(tokenizer, bos, config) else "",
            eos,
            tuple(token for token in stops if token not in (None, eos)),
        )

    def _eos_ids(self) -> Sequence[int]:
        """What transformers ends a continuation at: of generation_config.json, or config.json."""
        path = self._folder / "generation_config.json"
        fields = Fields(_read_json(path), str(path)) if path.is_file() else self.fields
        ids = fields.get("eos_token_id", int | tuple[int, ...], ())
        return [ids] if isinstance(ids, int) else ids


def _parsed(path: Path, content: bytes) -> Any:
    package = optional("tokenizers")
    try:
        return package.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing narrower
        raise ConfigError(f"{path}: is no tokenizer: {error}") from error


def _adds_bos(tokenizer: Any, bos: str, config: dict[str, Any]) -> bool:
    """Whether a text starts with the token, as tokenizer.json and its config tell."""
    if not bos:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    return tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(bos)]


def _token(value: Any) -> str:
    """A special token as tokenizer_config.json writes it: text, an object with it, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _files(folder: Path) -> list[SafetensorsFile]:
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if single.is_file():
        return [SafetensorsFile(single)]
    if not index.is_file():
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise ConfigError(f"{pickles[0]}: {PICKLE_REASON}")
        raise ConfigError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ConfigError(f"{index}: weight_map must be an object of file names")
    files = {name: SafetensorsFile(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise ConfigError(f"{index}: {tensor} is not in {name}, as it says")
    return list(files.values())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _load_json(path, path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _load_json(path: Path, content: bytes, what: str = "") -> dict[str, Any]:
    try:
        return as_object(json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: {what}is no JSON object ({error})") from None
