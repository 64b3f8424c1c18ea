"""A method is one file and one config: a new one trains at once, on any mesh."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, abstract_state, init_state
from sparseformer_jax.training.step import make_train_step
from tests.model.harness import assert_close, put

METHOD = '''
"""Dense attention whose heads are weighed, asked to weigh little, and divided by their size."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from sparseformer_jax.attention import dense
from sparseformer_jax.attention.base import AttentionOutput


@dataclasses.dataclass(frozen=True)
class Options:
    penalty: float = 0.1
    implementation: str | None = None


class Size(nnx.Variable):
    """The size of a head's output, a moving average."""


class Method(dense.Method):
    statistics_axes = {"total": ("heads",), "tokens": ()}

    def __init__(self, config, options, *, rngs):
        super().__init__(config, options, rngs=rngs)
        first = 1.0 + jnp.arange(config.num_heads)
        self.weight = nnx.Param(first / config.num_heads, axes=("heads",))
        self.size = Size(jnp.ones(config.num_heads), axes=("heads",))

    def attend(self, inputs, shard):
        attended = super().attend(inputs, shard)
        weight, size = self.weight[...], self.size[...]
        weights, _ = inputs.weights
        sizes = jnp.linalg.norm(attended.output, axis=-1)
        return AttentionOutput(
            attended.output * (weight / size)[:, None],
            {"head_penalty": jnp.full(weights.shape, self.options.penalty * jnp.mean(weight**2))},
            {"head_weight": jnp.mean(weight), "head_size": jnp.mean(sizes)},
            {
                "total": jnp.einsum("btn,bt->n", sizes, weights),
                "tokens": jnp.sum(weights),
            },
        )

    @classmethod
    def update(cls, options, variables, statistics):
        mean = statistics["total"] / statistics["tokens"]
        return {"size": 0.9 * variables["size"] + 0.1 * mean}
'''

CONFIG = """
from sparseformer_jax import presets, registry

def get_config(size="tiny"):
    config = presets.baseline(size)
    config.attention = registry.method_config("attention", "weighed", penalty=0.5)
    return config
"""


@pytest.fixture
def config(add_attention, tmp_path):
    add_attention("weighed", METHOD)
    (tmp_path / "weighed_config.py").write_text(CONFIG)
    config = runpy.run_path(str(tmp_path / "weighed_config.py"))["get_config"]()
    config.data.seq_len = 24
    config.optimizer.warmup_steps = 0
    config_lib.validate(config)
    return config


@pytest.fixture
def batch(config):
    rng = np.random.default_rng(0)
    shape = (1, config.train.batch_size, config.data.seq_len)
    return {
        "inputs": rng.integers(0, config.model.vocab_size, shape, np.int32),
        "targets": rng.integers(0, config.model.vocab_size, shape, np.int32),
        "weights": np.ones(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape),
    }


def train(config, batch, device_mesh, state=None):
    """Two steps; returns the state before them, the metrics of each, the state after."""
    with jax.set_mesh(device_mesh):
        model_def = ModelDef(config)
        params = {name: model_def.params[name] for name in model_def.trainable()}
        optimizer = make_optimizer(config.optimizer, 2, params)
        schedule = make_schedule(config.optimizer, 2)
        step = jax.jit(make_train_step(model_def, optimizer, schedule))
        if state is None:
            state = init_state(model_def, optimizer, jax.random.key(0))
        placed = abstract_state(model_def, optimizer, device_mesh)
        state = start = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, placed)
        batch = {name: put(x, None, "batch", "seq") for name, x in batch.items()}
        metrics = []
        for _ in range(2):
            state, measured = step(state, batch)
            metrics.append(measured)
        return jax.device_get((start, metrics, (state.params, state.variables)))


@pytest.mark.exhaustive
def test_a_new_method_trains_on_any_mesh(config, batch):
    one_device = mesh.make_mesh({}, jax.devices()[:1])
    start, metrics, (params, variables) = train(config, batch, one_device)
    first, second = metrics
    weights = (1 + np.arange(4)) / 4
    assert first["head_weight"] == pytest.approx(weights.mean())
    penalty = 0.5 * np.mean(weights**2) * config.model.num_layers
    assert first["head_penalty"] == pytest.approx(penalty)
    assert first["total_loss"] == pytest.approx(first["loss"] + penalty)
    assert second["total_loss"] < first["total_loss"]
    assert second["head_penalty"] < first["head_penalty"]
    (name,) = (name for name in params if name.endswith("attention/weight"))
    assert jnp.abs(params[name] - weights).min() > 1e-4
    seen = 0.1 * second["head_size"] + 0.09 * first["head_size"]
    (name,) = variables
    assert variables[name].mean() == pytest.approx(0.81 + seen)
    assert np.ptp(variables[name]) > 1e-3

    eight_devices = mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharded = train(config, batch, eight_devices, start)
    # AdamW divides by the gradient's size, so rounding in tiny gradients grows.
    assert_close(sharded[1], metrics, 1e-5)
    assert_close(sharded[2], (params, variables), 1e-3)
