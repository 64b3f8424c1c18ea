"""The estimate is a lower bound of what is compiled, and refuses in one line."""

import types

import jax
import pytest

from sparseformer_jax import describe, memory, mesh, presets
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.state import ModelDef


@pytest.mark.exhaustive
def test_a_lower_bound_of_what_is_compiled_and_not_an_idle_one():
    config = presets.baseline("tiny")
    config.mesh.fsdp, config.mesh.data = 2, 4
    needed = memory.estimate(config)
    with jax.set_mesh(mesh.make_mesh({"fsdp": 2, "data": 4})):
        state, temporary = describe._memory(config, ModelDef(config))
    assert state / 2 < needed.parameters + needed.training < state + temporary
    assert temporary / 6 < needed.activations < temporary


def test_activations_are_those_of_the_tokens_of_a_device():
    """A row of 128 tokens on each of 8 devices, two layers 64 wide, float32."""
    config = presets.baseline("tiny")
    assert memory.estimate(config).activations == 128 * 2 * (3 * 64 + 2 * 128 + 12 * 16) * 4
    config.model.remat = "full"
    assert memory.estimate(config).activations == 128 * 2 * 64 * 4


def test_parameters_are_counted_as_they_are_sharded():
    config = presets.baseline("tiny")
    copied = memory.estimate(config)
    config.mesh.fsdp, config.mesh.data = -1, 1
    sharded = memory.estimate(config)
    assert copied.parameters / 8 <= sharded.parameters < copied.parameters / 7
    assert sharded.activations == copied.activations
    config.optimizer.name = "muon"
    assert memory.estimate(config).training == sharded.training * 2 / 3


def test_what_is_frozen_needs_no_gradient():
    config = presets.baseline("tiny")
    everything = memory.estimate(config)
    config.train.trainable = "attention/query"
    part = memory.estimate(config)
    assert part.parameters == everything.parameters
    assert part.training < everything.training / 5
    assert part.activations < everything.activations


def test_the_largest_config_is_refused_in_one_line():
    config = presets.baseline("paper")
    config.model.embed_dim = config.model.mlp_dim = 10**6
    with pytest.raises(ConfigError) as caught:
        memory.check(config)
    message = str(caught.value)
    assert message.startswith("config: needs at least ")
    assert "--ignore_memory_estimate" in message
    assert "\n" not in message


def test_what_fits_is_let_through():
    memory.check(presets.baseline("tiny"))


def test_an_accelerator_says_what_it_has(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 3})
    unknown = types.SimpleNamespace(platform="tpu", memory_stats=lambda: None)
    for device, limit in ((gpu, 3), (unknown, None)):
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert memory.capacity() == limit
