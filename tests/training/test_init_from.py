"""A run starts with the parameters of another, by layer, and needs it no more."""

import shutil

import jax
import numpy as np
import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation.perplexity import evaluate_checkpoint
from sparseformer_jax.training import loop
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.init_from import first_state
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.restore import restore_state, saved_form
from sparseformer_jax.training.state import ModelDef

GATED = '''
"""Dense attention with a gate a head."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from sparseformer_jax.attention import dense

Options = dense.Options


class Method(dense.Method):
    def __init__(self, config, options, *, rngs):
        super().__init__(config, options, rngs=rngs)
        self.gate = nnx.Param(jnp.full(config.num_heads, 0.5), axes=("heads",))
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32), axes=())
'''


def with_attention(config, name, **options):
    config = config_lib.from_json(config_lib.to_json(config))
    config.attention = registry.method_config("attention", name, **options)
    return config


def start(config, sizes=None):
    """The model and its first state on a mesh of two devices."""
    sizes = sizes or {"tensor": 2}
    with jax.set_mesh(mesh.make_mesh(sizes, jax.devices()[:2])):
        model_def = ModelDef(config)
        params = {name: model_def.params[name] for name in model_def.trainable()}
        optimizer = make_optimizer(config.optimizer, 4, params)
        return model_def, *first_state(model_def, optimizer, jax.random.key(config.seed))


@pytest.fixture
def source(config, tmp_path):
    """A function that saves the first state of a config as steps 3 and 5 of a run."""

    def save(config):
        model_def, state, _ = start(config, {"fsdp": 2})
        meta = Meta(data={"examples": 0}, corpus="text", config=config_lib.to_json(config))
        with Checkpoints(tmp_path / "source", keep_last=2) as checkpoints:
            for step in (3, 5):
                checkpoints.save(step, saved_form(model_def, state), meta)
            checkpoints.wait()
        return str(tmp_path / "source"), model_def.to_layers(state)

    return save


def test_parameters_come_by_layer_onto_another_mesh(config, source):
    config = with_attention(config, "dense")
    config.init_from, before = source(config)
    config = with_attention(config, "masformer", span_size=8, full_layers=(1,))
    config.seed = 1
    model_def, state, (note,) = start(config)
    assert note == f"parameters start from step 5 of {config.init_from}"
    jax.tree.map(np.testing.assert_array_equal, model_def.to_layers(state), before)
    config.init_from += ":3"
    config.model.rope_theta, config.data.eos_token, config.train.z_loss = 5e5, "", 0.1
    *_, (note,) = start(config)
    assert "step 3 of" in note
    assert note.endswith(
        "; they were trained with other settings: data.eos_token: <eos> -> ; "
        "model.rope_theta: 10000.0 -> 500000.0"
    )


def test_what_the_method_adds_is_initialised_and_told(config, source, add_attention):
    add_attention("gated", GATED)
    config.init_from, before = source(with_attention(config, "dense"))
    model_def, state, (note,) = start(with_attention(config, "gated"))
    assert note.endswith("; of gated itself, initialised: layers/0/attention/gate, "
                         "layers/1/attention/gate, layers/0/attention/seen, layers/1/attention/seen")  # fmt: skip
    layers = model_def.to_layers(state)
    for name, value in before.params.items():
        np.testing.assert_array_equal(layers.params[name], value)
    np.testing.assert_array_equal(layers.params["layers/1/attention/gate"], np.full(4, 0.5))
    assert layers.variables.keys() == {f"layers/{i}/attention/seen" for i in (0, 1)}


def test_what_does_not_fit_is_one_line(config, source, add_attention):
    add_attention("gated", GATED)
    config.init_from, _ = source(with_attention(config, "gated"))

    def refused(config, match):
        with pytest.raises(ConfigError, match=match) as error:
            start(config)
        assert "\n" not in str(error.value)

    gated = with_attention(config, "gated")
    refused(with_attention(config, "dense"), r"left over: layers/./attention/(gate|seen)")
    gated.model.num_layers = 3  # the gate of the third layer is missing, not new
    refused(gated, r"init_from='.*': does not fit the model: missing: .*layers/2/.* more$")
    gated.model.num_layers, gated.model.qk_norm = 2, True
    refused(gated, r"missing: layers/./attention/(query|key)_norm/scale")
    gated.model.qk_norm, gated.model.mlp_dim = False, 64
    refused(gated, r"misshapen: .*mlp/.* is float32\[48, 32\] instead of float32\[64, 32\]")
    gated.init_from += ":4"
    refused(gated, r"no checkpoint of step 4 .* there are \[3, 5\]")
    gated.init_from = "nowhere"
    refused(gated, "init_from='nowhere': nowhere holds no checkpoints")


@pytest.mark.exhaustive
def test_masformer_from_a_dense_run_trains_resumes_and_evaluates(config, tmp_path, capsys):
    """The dense run is gone when it resumes."""
    config.train.accumulation_steps, config.model.dropout = 1, 0.0
    config.train.num_steps = config.optimizer.warmup_steps = 1
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    loop.train(with_attention(config, "dense"), dense)
    config = with_attention(config, "masformer", span_size=8, num_full_layers=1)
    config.init_from, config.seed = str(dense), 5
    config.optimizer.schedule, config.train.num_steps = "constant", 2
    config_lib.validate(config)
    before = evaluate_checkpoint(config, dense)["loss"]
    loop.train(config, sparse)
    assert f"parameters start from step 1 of {dense}" in capsys.readouterr().out
    shutil.rmtree(dense)
    config.train.num_steps = 3
    loop.train(config, sparse)
    assert "resuming from step 2" in capsys.readouterr().out
    after = evaluate_checkpoint(config, sparse)
    assert after["step"] == 3
    assert after["density"] < 1
    assert after["loss"] < before
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        assert int(restore_state(ModelDef(config), sparse).step) == 3
