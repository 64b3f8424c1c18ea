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
from sparseformer_jax.pretrained.mask_files import write_masks
from sparseformer_jax.pretrained.packages import optional
from sparseformer_jax.pretrained.safetensors import INDEX_FILE, SINGLE_FILE
from sparseformer_jax.pretrained.tables import Architecture, Entry
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef, TrainState

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}

_SHARD_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A parameter by its name in transformers, cut from its stack only when it is asked for."""

    name: str
    entry: Entry
    stack: jax.Array
    row: int | None  # None: it is the whole array
    kept: jax.Array | None = None  # which entries of the stack; None: all
    pattern: Pattern | None = None

    @property
    def size(self) -> int:
        return self.stack.size // (1 if self.row is None else len(self.stack))

    def array(self) -> np.ndarray:
        own = self._own(self.stack)
        return own if self.kept is None else np.where(self._own(self.kept), own, 0)

    def mask(self) -> np.ndarray:
        """Which entries are kept, as transformers has the weight."""
        assert self.kept is not None
        return self.entry.to_hugging_face(self._own(self.kept))

    def _own(self, stack: jax.Array) -> np.ndarray:
        return np.asarray(stack if self.row is None else stack[self.row])


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

    Sparse weights have zeros where their masks drop them, and the masks are packed beside them.

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
        weights = _weights(model_def, state, architecture)
        _write_weights(unfinished, weights, dtype, shard_bytes)
        if model_def.targets:
            sparse = [weight for weight in weights if weight.kept is not None]
            write_masks(unfinished, ((w.name, w.mask(), w.pattern) for w in sparse))
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


def _weights(model_def: ModelDef, state: TrainState, architecture: Architecture) -> list[_Weight]:
    """Every parameter, which all have a name in transformers, or the config would be refused.

    What makes masks of sparse weights has none: they come as their hard masks.
    """
    masks = jax.jit(model_def.masks)({**state.params, **state.variables})
    makers = {path for name in masks for path in model_def.sparsity.state_names(name).values()}
    weights = []
    for name in [name for name in state.params if name not in makers]:
        layers = model_def.names.of(name)
        entries = architecture.entries(layers)
        target = model_def.targets.get(name)
        for row, layer_name in enumerate(layers):
            entry, layer = entries[layer_name]
            weight = _Weight(
                entry.name("hugging_face", layer),
                entry,
                state.params[name],
                None if layers == [name] else row,
                masks.get(name),
                None if target is None else target.pattern,
            )
            weights.append(weight)
    return weights


def _write_weights(folder: Path, weights: list[_Weight], dtype: str, shard_bytes: int) -> None:
    """Writes shards one after another: beside the parameters memory holds one."""
    save_file = optional("safetensors.numpy").save_file
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    shards = list(_shards(weights, shard_bytes // itemsize))
    weight_map: dict[str, str] = {}
    total = itemsize * sum(weight.size for weight in weights)
    with byte_bar("exporting", total) as bar:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = file if len(shards) > 1 else SINGLE_FILE
            tensors = {}
            for weight in shard:
                tensors[weight.name] = _cast(weight, dtype)
                weight_map[weight.name] = file
                bar.update(weight.size * itemsize)
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _shards(weights: list[_Weight], limit: int) -> Iterator[list[_Weight]]:
    """Yields weights of so many numbers together, or a single larger one."""
    shard: list[_Weight] = []
    held = 0
    for weight in weights:
        if shard and held + weight.size > limit:
            yield shard
            shard, held = [], 0
        shard.append(weight)
        held += weight.size
    yield shard


def _cast(weight: _Weight, dtype: str) -> np.ndarray:
    theirs = weight.entry.to_hugging_face(weight.array())
    with np.errstate(over="ignore"):
        cast = theirs.astype(DTYPES[dtype], copy=False)
    if cast is not theirs and np.isinf(cast).any() and not np.isinf(theirs).any():
        raise ConfigError(f"--dtype={dtype}: {weight.name} has numbers beyond it; take bfloat16")
    return cast


def _write_tokenizer(folder: Path, config: ConfigDict) -> dict[str, int | list[int]]:
    """Writes the tokenizer; returns the numbers of its special tokens, for config.json."""
    tokenizer = make_tokenizer(config.data)
    stops = sorted(tokenizer.stop_ids, key=lambda number: (number != tokenizer.eos_id, number))
    ends = stops if len(stops) > 1 else next(iter(stops), None)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
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
