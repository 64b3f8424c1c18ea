"""Makes workdirs: of a dense run one with masks, of one with masks a dense one."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.folders import made_whole
from sparseformer_jax.sparsity import calibration
from sparseformer_jax.sparsity.base import Target, hard
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.sparsity.one_shot import Recipe
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.restore import restore_layers
from sparseformer_jax.training.state import ModelDef
from sparseformer_jax.training.workdir import CONFIG_FILE, write_atomically

_TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Text:
    """What calibration reads.

    Attributes:
      split: of the config's data.
      num_samples: examples of `data.seq_len` tokens.
      seed: of their draw, below 2**32.

    Raises:
      ConfigError: a number is out of its range.
    """

    split: str = "train"
    num_samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"--num_samples={self.num_samples}: must be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed={self.seed}: must be from 0 to below 2**32")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by the names of layers, in the host's memory.

    Attributes:
      model_def: of its config.
      step: of training.
      params: parameters.
      variables: whatever else the model owns.
    """

    model_def: ModelDef
    step: int
    params: dict[str, jax.Array]
    variables: dict[str, jax.Array]

    @property
    def targets(self) -> dict[str, Target]:
        """The sparse weights."""
        return _by_layer(self.model_def)

    def masks(self) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """Yields name, weight and hard mask of each sparse weight, one after another."""
        method, values = self.model_def.sparsity, {**self.params, **self.variables}
        for name, target in self.targets.items():
            paths = method.state_names(name)
            own = {state: calibration.on_device(values[path]) for state, path in paths.items()}
            weight = calibration.on_device(values[name])
            yield name, weight, method.kept(weight, own, target)


def read(config: ConfigDict, workdir: Path, step: int | None) -> Checkpoint:
    """Returns a checkpoint of a run, the newest unless a step is given.

    Raises:
      ConfigError: there is none, or it does not fit the config.
    """
    with one_device():
        model_def = ModelDef(config)
        step, state = restore_layers(model_def, workdir, step)
    return Checkpoint(model_def, step, state["params"], state["variables"])


def prune(
    config: ConfigDict,
    workdir: Path,
    out: Path,
    recipe: Recipe,
    targets: tuple[str, ...],
    *,
    text: Text,
    overridden: ConfigDict,
    step: int | None = None,
) -> str:
    """Writes the workdir of a pruned run, whole or not at all, and returns a line about it.

    Its checkpoint, of the same step, holds masks beside the weights, which are dense, or those
    that the recipe has updated.

    Args:
      config: of the run, as it is saved.
      workdir: of the run.
      out: to be made; there must be none, or an empty folder.
      recipe: what is done.
      targets: which weights, as in `sparsity.targets`, without patterns.
      text: what inputs are observed on.
      overridden: the config with other data, of which text is read.
      step: which checkpoint; None: the newest.

    Raises:
      ConfigError: weights are sparse already, a target names nothing that can be pruned, groups
        do not divide, text is too short, or there is no such checkpoint.
      NonFiniteError: scores are not finite numbers.
    """
    if config.sparsity.name != "none":
        raise ConfigError(
            f"--workdir={workdir}: its weights are sparse already, sparsity.name="
            f"{config.sparsity.name!r}; make them dense first: python -m sparseformer_jax.sparsity"
            f" bake --workdir={workdir} --out=FOLDER"
        )
    with made_whole(out) as folder:
        sparse = _copy(config)
        own = f"={recipe.pattern}" if isinstance(recipe.pattern, Pattern) else ""
        chosen = tuple(f"{name}{own}" for name in targets)
        sparse.sparsity = registry.method_config("sparsity", "fixed", targets=chosen)
        with one_device():
            sparse_def = ModelDef(sparse)
            names = list(_by_layer(sparse_def))
        dense = read(config, workdir, step)
        samples = None
        if recipe.reads_inputs:
            samples = calibration.draw(overridden, text.split, text.num_samples, text.seed)
        params, variables = dict(dense.params), dict(dense.variables)
        kept = total = 0
        for name, weight, mask in calibration.prune_model(
            dense.model_def,
            {**dense.params, **dense.variables},
            names,
            recipe,
            samples,
            step=dense.step,
            batch_size=overridden.eval.batch_size,
        ):
            place = params[name].sharding
            if recipe.update_weights or recipe.permute:
                params[name] = jax.device_put(weight, place)
            if mask is None:
                continue
            path = sparse_def.sparsity.state_names(name)["mask"]
            variables[path] = jax.device_put(mask, place)
            kept, total = kept + int(mask.sum()), total + mask.size
        _write(folder, out, sparse, dense.step, params, variables)
    return (
        f"{recipe.method} keeps {kept / total:.2%} of {len(names)} matrices; step {dense.step} of"
        f" {workdir} is with its masks in {out}"
    )


def bake(config: ConfigDict, workdir: Path, out: Path, step: int | None = None) -> str:
    """Writes a run with sparse weights as a dense one, zeros in their places; returns a line.

    Args:
      config: of the run, as it is saved.
      workdir: of the run.
      out: to be made; there must be none, or an empty folder.
      step: which checkpoint; None: the newest.

    Raises:
      ConfigError: it has no masks, or there is no such checkpoint.
    """
    require_masks(config, workdir)
    with made_whole(out) as folder:
        sparse = read(config, workdir, step)
        config = _copy(config)
        config.sparsity = registry.method_config("sparsity", "none")
        with one_device():
            dense = ModelDef(config)
        params, variables = (
            {layer: held[layer] for name in wanted for layer in dense.names.of(name)}
            for held, wanted in (
                (sparse.params, dense.params),
                (sparse.variables, dense.variables),
            )
        )
        zeros = total = 0
        for name, weight, mask in sparse.masks():
            params[name] = jax.device_put(hard(weight, mask), params[name].sharding)
            zeros, total = zeros + int((~mask).sum()), total + mask.size
        _write(folder, out, config, sparse.step, params, variables)
    return (
        f"step {sparse.step} of {workdir} is dense in {out}: zeros are {zeros / total:.2%} of what"
        " was sparse"
    )


def require_masks(config: ConfigDict, workdir: Path) -> None:
    """Refuses a run without sparse weights.

    Raises:
      ConfigError: it is one.
    """
    if config.sparsity.name == "none":
        raise ConfigError(
            f"--workdir={workdir}: is a dense checkpoint, it has no masks; make some: python -m"
            " sparseformer_jax.sparsity prune"
        )


def _by_layer(model_def: ModelDef) -> dict[str, Target]:
    """The sparse weights of a model, layer after layer."""
    found = {
        layer: target
        for name, target in model_def.targets.items()
        for layer in model_def.names.of(name)
    }
    return dict(sorted(found.items(), key=lambda item: int(item[0].split("/")[1])))


def _write(
    folder: Path,
    final: Path,
    config: ConfigDict,
    step: int,
    params: dict[str, jax.Array],
    variables: dict[str, jax.Array],
) -> None:
    """Writes a workdir; `final` is what the folder will be called."""
    if config.data.tokenizer != "bytes":
        shutil.copyfile(Path(config.data.tokenizer).expanduser(), folder / _TOKENIZER_FILE)
        config.data.tokenizer = str(final.absolute() / _TOKENIZER_FILE)
    text = config_lib.to_json(config)
    state: dict[str, Any] = {"step": jnp.int32(step), "params": params, "variables": variables}
    with Checkpoints(folder, keep_last=1) as checkpoints:
        checkpoints.write(step, state, Meta({}, "", text))
    write_atomically(folder / CONFIG_FILE, text + "\n")


def _copy(config: ConfigDict) -> ConfigDict:
    """An equal config, unlocked; ConfigDict's own copies forget what type a None stands for."""
    return config_lib.from_json(config_lib.to_json(config))


def one_device() -> Any:
    """One device: what is on disk fits any mesh."""
    return jax.set_mesh(mesh.make_mesh({}, jax.local_devices()[:1]))
