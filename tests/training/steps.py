"""A few training steps of a config on a mesh, for tests that compare them."""

import functools

import jax
import numpy as np

from sparseformer_jax import mesh
from sparseformer_jax.config import from_json, to_json
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, abstract_state, init_state
from sparseformer_jax.training.step import make_train_step


@functools.cache
def programs(config_json, device_mesh):
    """Functions that make the first state and take a step, compiled once for a config and mesh."""
    config = from_json(config_json)
    model_def = ModelDef(config)
    params = {name: model_def.params[name] for name in model_def.trainable()}
    optimizer = make_optimizer(config.optimizer, 10, params)
    abstract = abstract_state(model_def, optimizer, device_mesh)
    start = jax.jit(lambda: init_state(model_def, optimizer, jax.random.key(0)))
    step = make_train_step(model_def, optimizer, make_schedule(config.optimizer, 10))
    return abstract, start, jax.jit(step)


def train(config, sizes, batch, num_steps=3, state=None):
    """Returns losses, the last metrics and the state after a few steps on a mesh.

    `batch` holds arrays [B, T], which accumulation cuts into pieces. `state`: from which they
    go on; None: the first one.
    """
    devices = jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))]
    device_mesh = mesh.make_mesh(sizes, devices)
    with jax.set_mesh(device_mesh):
        abstract, start, step = programs(to_json(config), device_mesh)
        if state is None:
            state = start()
        else:
            state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)
        assert jax.tree.map(lambda x: x.sharding.spec, state.params) == jax.tree.map(
            lambda x: x.sharding.spec, abstract.params
        )
        pieces = config.train.accumulation_steps
        sharding = jax.NamedSharding(device_mesh, mesh.spec(None, "batch", "seq"))
        placed = {
            name: jax.device_put(array.reshape(pieces, -1, array.shape[-1]), sharding)
            for name, array in batch.items()
        }
        losses = []
        for _ in range(num_steps):
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(metrics), jax.device_get(state)


def packed_batch(vocab_size, *, rows=16, seq_len=32):
    """Rows of two documents with one target in ten without weight, rows 3 and 4 without any."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab_size, (rows, seq_len + 1), dtype=np.int32)
    lengths = random.integers(5, seq_len - 4, rows)
    place = np.arange(seq_len)
    second = place >= lengths[:, None]
    counts = (place != lengths[:, None] - 1) & (random.random((rows, seq_len)) > 0.1)
    counts[3:5] = False
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.where(second, place - lengths[:, None], place).astype(np.int32),
        "segment_ids": 1 + second.astype(np.int32),
        "weights": counts.astype(np.float32),
    }
