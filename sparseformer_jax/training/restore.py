"""Takes the state of a run out of its checkpoints, for evaluation and sampling."""

from pathlib import Path

import jax
import jax.numpy as jnp

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.state import ModelDef, TrainState


def restore_state(model_def: ModelDef, workdir: Path, step: int | None = None) -> TrainState:
    """Returns what a model is made of, without an optimiser, sharded over the current mesh.

    Args:
      model_def: the model the run trains.
      workdir: of the run.
      step: which checkpoint; None: the newest.

    Raises:
      ValueError: there is no such checkpoint, or it does not fit the model.
    """
    workdir = Path(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"--workdir={workdir} holds no checkpoints; train there first")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None:
            raise ConfigError(f"--workdir={workdir} holds no complete checkpoint yet")
        params, variables = model_def.abstract(jax.sharding.get_mesh())
        items = checkpoints.restore(step, {"params": params, "variables": variables})
        return TrainState(jnp.asarray(step, jnp.int32), **items)
