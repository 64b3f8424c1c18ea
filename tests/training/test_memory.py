"""No array holds the logits of a batch: read from what the compiler plans."""

import jax
import jax.numpy as jnp
import pytest

from sparseformer_jax import mesh, presets, registry
from sparseformer_jax.describe import abstract_batch
from sparseformer_jax.evaluation.perplexity import make_eval_step
from sparseformer_jax.model import loss
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, TrainState, abstract_state
from sparseformer_jax.training.step import make_train_step


@pytest.fixture
def config():
    """A narrow model with a real vocabulary."""
    config = presets.baseline("tiny")
    config.attention = registry.method_config("attention", "dense")
    config.model.update(vocab_size=50_304, num_layers=1, embed_dim=16, mlp_dim=16)
    config.data.seq_len = 512
    return config


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2, "fsdp": 2, "context": 2}], ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.representative("True-*tensor*", "False-{}")
def test_logits_of_a_batch_are_never_whole(config, monkeypatch, sizes, train):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 2**19)
    device_mesh = mesh.make_mesh(sizes, None if sizes else jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        step, arguments = train_step(config) if train else eval_step(config)
        planned = jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    logits = 4 * config.train.batch_size * config.data.seq_len * config.model.vocab_size
    assert planned < logits / device_mesh.size / 4


def train_step(config):
    model_def, device_mesh = ModelDef(config), jax.sharding.get_mesh()
    optimizer = make_optimizer(config.optimizer, 10, model_def.params)
    state = abstract_state(model_def, optimizer, device_mesh)
    step = make_train_step(model_def, optimizer, make_schedule(config.optimizer, 10))
    return step, (state, abstract_batch(config, device_mesh))


def eval_step(config):
    model_def, device_mesh = ModelDef(config), jax.sharding.get_mesh()
    rows = jax.NamedSharding(device_mesh, mesh.spec("batch", "seq"))
    batch = {
        name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=rows)
        for name, x in abstract_batch(config, device_mesh).items()
    }
    state = TrainState(jnp.int32(0), *model_def.abstract(device_mesh))
    return make_eval_step(model_def), (state, batch)
