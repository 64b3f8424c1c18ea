"""The checkpoint of a random model, as evaluations restore it."""

import jax
import jax.numpy as jnp

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh, presets
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.state import ModelDef


def write_checkpoint(workdir, attention=None):
    """Writes step 3 of a run; returns its config, and the model on one device."""
    config = presets.baseline("tiny")
    if attention is not None:
        config.attention = attention
    config.data.seq_len = 32
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        params, variables = model_def.init(jax.random.key(0))
        state = {"step": jnp.zeros((), jnp.int32), "params": model_def.to_layers(params)}
        meta = Meta({}, "", config_lib.to_json(config))
        with Checkpoints(workdir, keep_last=1) as checkpoints:
            checkpoints.write(3, state | {"variables": variables}, meta)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    return config, model_def.model(jax.tree.map(jnp.asarray, jax.device_get(params)), variables, 0)
