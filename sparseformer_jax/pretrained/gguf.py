"""GGUF files: one, split ones (`-00001-of-00003.gguf`), and ones cut into plain parts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained import gguf_rope, gguf_tokenizer
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.gguf_header import GgufHeader, GgufTensor
from sparseformer_jax.pretrained.packages import optional
from sparseformer_jax.pretrained.parts import Parts
from sparseformer_jax.pretrained.source import Naming, PretrainedTokenizer

# What weights are kept in, of what the gguf package knows.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PART = re.compile(r"(.+\.gguf)\.part(\d+)")

# Not a weight: what slows each frequency of rotary positions.
DIVISORS = "rope_freqs.weight"

# Of numbers that are dequantised at a time: what bounds the memory beside the result.
_PIECE = 2**21

# Names of transformers' config.json for what stands behind `general.architecture`.
_SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}


class GgufFiles:
    """A `Source` of a GGUF file, or of the files it was split or cut into.

    Args:
      paths: one file, which names its siblings where it is split, or all parts in order.

    Raises:
      ConfigError: a header is damaged, a file is missing, or the gguf package.
    """

    naming: Naming = "gguf"

    def __init__(self, paths: Sequence[Path]) -> None:
        self._gguf = optional("gguf")
        sizes = {
            int(kind): (kind.name, *size) for kind, size in self._gguf.GGML_QUANT_SIZES.items()
        }
        self.where = str(paths[0])
        self._tensors: dict[str, tuple[Parts, GgufTensor]] = {}
        self._metadata: dict[str, Any] = {}
        for parts in _opened(paths):
            header = GgufHeader(parts, sizes)
            self._metadata = header.fields | self._metadata
            for name, tensor in header.tensors.items():
                if name in self._tensors:
                    raise ConfigError(f"{parts.name}: tensor {name} is in another part, too")
                self._tensors[name] = (parts, tensor)
        self._check_whole(self._metadata)
        self.shapes = {name: tensor.shape for name, (_, tensor) in self._tensors.items()}
        self.architecture: str = Fields(self._metadata, self.where).get("general.architecture", str)
        self.fields = Fields(self._config(), self.where)

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """Returns a tensor, dequantised; `Source.read`."""
        parts, tensor = self._tensors[name]
        if tensor.type not in TYPES:
            known = ", ".join(TYPES)
            raise ConfigError(f"{self.where}: tensor {name} is {tensor.type}; known are {known}")
        kind = self._gguf.GGMLQuantizationType[tensor.type]
        rows = parts.read(tensor.start, tensor.num_bytes).reshape(-1, self._row_bytes(tensor))
        values = np.empty((len(rows), tensor.shape[-1]), np.float32)
        step = max(1, _PIECE // tensor.shape[-1])
        for first in range(0, len(rows), step):
            piece: UInt8[np.ndarray, "rows bytes"] = rows[first : first + step]
            values[first : first + step] = self._gguf.dequantize(piece, kind)
        return values.reshape(tensor.shape)

    def tokenizer(self) -> PretrainedTokenizer:
        """Returns the tokenizer that the metadata describe; `Source.tokenizer`."""
        return gguf_tokenizer.rebuild(Fields(self._metadata, self.where), self.architecture)

    def _row_bytes(self, tensor: GgufTensor) -> int:
        return tensor.num_bytes * tensor.shape[-1] // int(np.prod(tensor.shape))

    def _config(self) -> dict[str, Any]:
        """The settings, by their names in transformers' config.json."""
        prefix = f"{self.architecture}."
        own = {
            name.removeprefix(prefix): value
            for name, value in self._metadata.items()
            if name.startswith(prefix)
        }
        config = {theirs: own[name] for name, theirs in _SETTINGS.items() if name in own}
        # Older files tell the size of a head by what is rotated of it.
        config.setdefault("head_dim", own.get("rope.dimension_count"))
        config["vocab_size"] = self.shapes.get("token_embd.weight", (None,))[0]
        config["tie_word_embeddings"] = "output.weight" not in self.shapes
        config["rope_scaling"] = gguf_rope.named_scaling(own, self.where)
        if DIVISORS in self.shapes:
            theta = Fields(config, self.where).get("rope_theta", float, 10000.0)
            divisors = self.read(DIVISORS)
            config["rope_scaling"] = gguf_rope.listed_scaling(divisors, theta, self.where)
        return config

    def _check_whole(self, metadata: Mapping[str, Any]) -> None:
        expected = metadata.get("split.tensors.count", len(self._tensors))
        if expected != len(self._tensors):
            raise ConfigError(
                f"{self.where}: split.tensors.count={expected}, but the files hold "
                f"{len(self._tensors)}; a part is missing"
            )


def _opened(paths: Sequence[Path]) -> list[Parts]:
    """The files with a header of their own each."""
    if len(paths) > 1:
        is_split = all(_SPLIT.fullmatch(path.name) for path in paths)
        return [Parts([path]) for path in paths] if is_split else [Parts(paths)]
    (path,) = paths
    split, part = _SPLIT.fullmatch(path.name), _PART.fullmatch(path.name)
    if split:
        count = int(split[3])
        names = [f"{split[1]}-{number:05}-of-{split[3]}.gguf" for number in range(1, count + 1)]
        return [Parts([path.with_name(name)]) for name in names]
    if part:
        siblings = {
            int(match[2]): sibling
            for sibling in path.parent.iterdir()
            if (match := _PART.fullmatch(sibling.name)) and match[1] == part[1]
        }
        return [Parts([siblings[number] for number in sorted(siblings)])]
    return [Parts([path])]
