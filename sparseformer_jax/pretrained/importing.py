"""Makes a workdir of a pretrained model, tensor by tensor."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import default_config, mesh, units
from sparseformer_jax.checks import ConfigError, suggest
from sparseformer_jax.data.progress import byte_bar
from sparseformer_jax.pretrained import architectures
from sparseformer_jax.pretrained.folders import made_whole
from sparseformer_jax.pretrained.gguf import GgufFiles
from sparseformer_jax.pretrained.safetensors import PICKLE_REASON, PICKLES, SafetensorsFolder
from sparseformer_jax.pretrained.source import PretrainedTokenizer, Source
from sparseformer_jax.pretrained.tables import Architecture, Entry
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.restore import first_names
from sparseformer_jax.training.state import ModelDef
from sparseformer_jax.training.workdir import CONFIG_FILE, write_atomically

TOKENIZER_FILE = "tokenizer.json"

# Tokens of a window, unless the model's context is shorter or the user says another.
_SEQ_LEN = 1024


def import_model(
    paths: Sequence[Path], workdir: Path, override: Callable[[ConfigDict], None]
) -> str:
    """Writes the workdir of a pretrained model, whole or not at all, and returns a line about it.

    Its checkpoint, of step 0, holds the parameters; config.json says what model it is and what
    attention it was trained with.

    Args:
      paths: a folder of transformers, a GGUF file, or the parts of one in order.
      workdir: to be made; there must be none, or an empty folder.
      override: changes the config before it is used.

    Raises:
      ConfigError: the files are damaged, the architecture is unknown, or weights are missing,
        left over or of another shape.
    """
    with made_whole(workdir) as folder:
        source = open_source(paths)
        architecture = architecture_of(source)
        tokenizer = source.tokenizer()
        config = make_config(source, architecture, tokenizer, workdir / TOKENIZER_FILE)
        override(config)
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.json)
        config_lib.validate(config)
        with jax.set_mesh(_sharing(config)):
            model_def = ModelDef(config)
            params = load_params(source, architecture, model_def)
            state = {"step": jnp.zeros((), jnp.int32), "params": params, "variables": {}}
            with Checkpoints(folder, keep_last=1) as checkpoints:
                checkpoints.write(0, state, Meta({}, "", config_lib.to_json(config)))
        write_atomically(folder / CONFIG_FILE, config_lib.to_json(config) + "\n")
    size = units.count(sum(array.size for array in params.values()))
    return f"{source.where}: {architecture.model_type}, {size} parameters, is now in {workdir}"


def _sharing(config: ConfigDict) -> jax.sharding.Mesh:
    """The devices of the config's mesh that share parameters, without those that hold copies."""
    sizes = config_lib.resolve_mesh(config.mesh, jax.device_count())
    shared = {axis: sizes[axis] for axis in ("fsdp", "tensor")}
    return mesh.make_mesh(shared, jax.devices()[: math.prod(shared.values())])


def open_source(paths: Sequence[Path]) -> Source:
    """Returns what the paths hold.

    Raises:
      ConfigError: they are nothing that can be read, or hold pickles.
    """
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file or folder")
        if path.suffix in PICKLES:
            raise ConfigError(f"{path}: {PICKLE_REASON}")
        if path.suffix == ".safetensors":
            raise ConfigError(f"{path}: give the folder that it is in, with its config.json")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise ConfigError(f"{folders[0]}: is a folder; give it alone, or the parts of one file")
    return SafetensorsFolder(folders[0]) if folders else GgufFiles(paths)


def architecture_of(source: Source) -> Architecture:
    """Returns the architecture of a source; raises ConfigError if it is unknown."""
    known = {
        architecture.gguf if source.naming == "gguf" else architecture.model_type: architecture
        for architecture in architectures.known()
    }
    known.pop("", None)
    if source.architecture not in known:
        raise ConfigError(
            f"{source.where}: architecture {source.architecture!r} is unknown"
            f"{suggest(source.architecture, known)}"
        )
    return known[source.architecture]


def make_config(
    source: Source, architecture: Architecture, tokenizer: PretrainedTokenizer, path: Path
) -> ConfigDict:
    """Returns the config of a pretrained model.

    Args:
      source: the model.
      architecture: its own.
      tokenizer: its own.
      path: where tokenizer.json will be.

    Raises:
      ConfigError: a setting is missing, of another type, or asks for what the model cannot do.
    """
    config = default_config.get_config()
    architecture.read(source.fields, config)
    config.data.tokenizer = str(path.absolute())
    config.data.bos_token, config.data.eos_token = tokenizer.bos_token, tokenizer.eos_token
    config.data.stop_tokens = tokenizer.stop_tokens
    config.data.seq_len = min(_SEQ_LEN, config.model.max_positions)
    config.eval.split = "test"
    return config


def load_params(
    source: Source, architecture: Architecture, model_def: ModelDef
) -> dict[str, jax.Array]:
    """Returns the parameters by layer, in the host's memory, sharded over the current mesh.

    Tensors are read one by one: beside the parameters there is never more than one.

    Raises:
      ConfigError: some are missing, left over, of another shape, or hold no weights.
    """
    params, _ = model_def.abstract(jax.sharding.get_mesh())
    wanted = model_def.abstract_layers(params)
    entries = architecture.entries(wanted)
    _check_names(source, architecture, wanted, entries)
    loaded = {}
    total = sum(math.prod(array.shape) * array.dtype.itemsize for array in wanted.values())
    with byte_bar("importing", total) as bar:
        for name, (entry, layer) in entries.items():
            array = wanted[name]
            theirs = source.read(entry.name(source.naming, layer))
            ours = entry.to_ours(theirs, array.shape, source.naming).astype(array.dtype, copy=False)
            loaded[name] = _placed(ours, array.sharding)
            bar.update(ours.nbytes)
            del theirs, ours
    return loaded


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    return jax.device_put(array, sharding.with_memory_kind("pinned_host")).block_until_ready()


def _check_names(
    source: Source,
    architecture: Architecture,
    wanted: Mapping[str, Any],
    entries: Mapping[str, tuple[Entry, str]],
) -> None:
    """Compares what the model needs with what there is, before anything is read."""
    unknown = [name for name in wanted if name not in entries]
    if unknown:
        raise ConfigError(
            f"{source.where}: {architecture.model_type} has no {first_names(unknown)}; leave "
            "model.* and attention.* as the file has them"
        )
    names = {ours: entry.name(source.naming, layer) for ours, (entry, layer) in entries.items()}
    used = set(names.values())
    missing = [name for name in names.values() if name not in source.shapes]
    # A tied head is saved by some programs, as the embedding once more.
    spare = {
        entry.name(source.naming, "") for entry in architecture.table if entry.ours == "head/kernel"
    }
    left_over = [
        name
        for name in source.shapes
        if name not in used and name not in spare and not architecture.is_unused(name)
    ]
    misshapen = []
    for ours, name in names.items():
        expected = entries[ours][0].shape_elsewhere(wanted[ours].shape)
        if name in source.shapes and source.shapes[name] != expected:
            misshapen.append(f"{name} is {list(source.shapes[name])} instead of {list(expected)}")
    lists = {"missing": missing, "left over": left_over, "misshapen": misshapen}
    wrong = "; ".join(f"{what}: {first_names(n)}" for what, n in lists.items() if n)
    if wrong:
        raise ConfigError(f"{source.where}: does not fit its settings: {wrong}")
