"""Writes a folder that transformers opens, with the same logits."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from sparseformer_jax import mesh
from sparseformer_jax.checks import ConfigError, check_choice
from sparseformer_jax.data.progress import byte_bar
from sparseformer_jax.data.tokenizer import ByteTokenizer, make_tokenizer
from sparseformer_jax.pretrained import architectures
from sparseformer_jax.pretrained.folders import made_whole
from sparseformer_jax.pretrained.safetensors import INDEX_FILE, SINGLE_FILE
from sparseformer_jax.pretrained.tables import Architecture, Entry
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}

_SHARD_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Where a weight is found and what it becomes."""

    ours: str
    theirs: str
    entry: Entry


def export_model(
    config: ConfigDict,
    workdir: Path,
    folder: Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    shard_bytes: int = _SHARD_BYTES,
) -> str:
    """Writes a checkpoint as a folder of transformers, whole or not at all; returns a line on it.

    Weights that are zero stay so, in their places.

    Args:
      config: of the run.
      workdir: of the run.
      folder: to be made; there must be none, or an empty one.
      step: which checkpoint; None: the newest.
      dtype: of the weights.
      shard_bytes: the most that a file holds, but for one with a single larger weight.

    Raises:
      ConfigError: there is no such checkpoint, transformers has no such model, a weight does
        not fit the dtype, or the folder cannot be made.
    """
    check_choice("--dtype", dtype, tuple(DTYPES))
    architecture, fields = _architecture(config)
    with made_whole(folder) as unfinished, jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        state = restore_state(model_def, workdir, step)
        arrays = model_def.to_layers(state.params)
        weights = [
            _Weight(ours, entry.name("hugging_face", layer), entry)
            for ours, (entry, layer) in architecture.entries(arrays).items()
        ]
        if len(weights) < len(arrays):
            left = sorted(arrays.keys() - {weight.ours for weight in weights})
            raise ConfigError(f"--workdir={workdir}: {architecture.class_name} has no {left[0]}")
        _write_weights(unfinished, arrays, weights, dtype, shard_bytes)
        special = _write_tokenizer(unfinished, config)
        settings = {
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
            **fields,
            **special,
            "dtype": dtype,
        }
        _write_json(unfinished / "config.json", settings)
    return f"step {int(state.step)} of {workdir} is now {architecture.class_name} in {folder}"


def _architecture(config: ConfigDict) -> tuple[Architecture, dict[str, Any]]:
    """The first architecture that is the model of a config, and its settings."""
    reasons = []
    for architecture in architectures.known():
        try:
            return architecture, architecture.write(config)
        except ValueError as error:
            reasons.append(f"{architecture.model_type}: {error}")
    raise ConfigError(f"--workdir: transformers has no such model: {'; '.join(reasons)}")


def _write_weights(
    folder: Path,
    arrays: Mapping[str, jax.Array],
    weights: list[_Weight],
    dtype: str,
    shard_bytes: int,
) -> None:
    """Writes shards one after another: beside the parameters memory holds one."""
    from safetensors.numpy import save_file

    shards = list(_shards(arrays, weights, np.dtype(DTYPES[dtype]).itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    with byte_bar("exporting", sum(array.nbytes for array in arrays.values())) as bar:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = name if len(shards) > 1 else SINGLE_FILE
            tensors = {}
            for weight in shard:
                array = np.asarray(arrays[weight.ours])
                tensors[weight.theirs] = _cast(weight.theirs, weight.entry, array, dtype)
                weight_map[weight.theirs] = name
                bar.update(array.nbytes)
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(array.size for array in arrays.values()) * np.dtype(DTYPES[dtype]).itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _shards(
    arrays: Mapping[str, jax.Array], weights: list[_Weight], itemsize: int, limit: int
) -> Iterator[list[_Weight]]:
    shard: list[_Weight] = []
    held = 0
    for weight in weights:
        size = arrays[weight.ours].size * itemsize
        if shard and held + size > limit:
            yield shard
            shard, held = [], 0
        shard.append(weight)
        held += size
    yield shard


def _cast(name: str, entry: Entry, array: np.ndarray, dtype: str) -> np.ndarray:
    theirs = entry.to_hugging_face(array)
    with np.errstate(over="ignore"):
        cast = theirs.astype(DTYPES[dtype])
    if not np.isfinite(cast.astype(np.float32)).all() and np.isfinite(theirs).all():
        raise ConfigError(f"--dtype={dtype}: {name} has numbers beyond it; take bfloat16")
    return cast


def _write_tokenizer(folder: Path, config: ConfigDict) -> dict[str, int]:
    """Writes the tokenizer; returns the numbers of its special tokens, for config.json."""
    tokenizer = make_tokenizer(config.data)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if not isinstance(tokenizer, ByteTokenizer):  # transformers has none of bytes alone
        path = Path(config.data.tokenizer).expanduser()
        (folder / "tokenizer.json").write_bytes(path.read_bytes())
        tokens = {"bos_token": config.data.bos_token, "eos_token": config.data.eos_token}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bool(config.data.bos_token),
            "clean_up_tokenization_spaces": False,
            **{name: token for name, token in tokens.items() if token},
        }
        _write_json(folder / "tokenizer_config.json", settings)
    return {name: number for name, number in special.items() if number is not None}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
