"""Variables of a method: what the trainer can hold, and what it refuses in one line."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparseformer_jax import mesh, registry
from sparseformer_jax.attention import dense
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.state import ModelDef, init_state


@pytest.fixture
def model_def(config, monkeypatch):
    """A function that gives the model of a method with one variable more."""
    config.attention = registry.method_config("attention", "dense")

    def build(make):
        class Method(dense.Method):
            def __init__(self, config, options, *, rngs):
                super().__init__(config, options, rngs=rngs)
                self.own = make()

        monkeypatch.setattr(dense, "Method", Method)
        with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
            return ModelDef(config)

    return build


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nnx.Param(jnp.ones(3)), "attention/own: a variable without logical axes; make"),
        (lambda: nnx.data(jnp.ones(3)), "attention/own: an array of a module is no variable"),
        (
            lambda: nnx.Param(jnp.ones((3, 2)), axes=("heads",)),
            r"attention/own: axes=\('heads',\) for 2 dimensions; make",
        ),
        (
            lambda: nnx.Param(jnp.ones(3, jnp.int32), axes=(None,)),
            "attention/own: an nnx.Param of dtype int32 has no gradient; make it another",
        ),
    ],
)
def test_what_cannot_be_held_is_one_line(model_def, make, message):
    with pytest.raises(ConfigError, match=message) as error:
        model_def(make)
    assert "\n" not in str(error.value)


def test_integers_that_do_not_train_are_held(model_def, config):
    made = model_def(lambda: nnx.Variable(jnp.arange(4, dtype=jnp.int32), axes=("heads",)))
    optimizer = make_optimizer(config.optimizer, 4, made.params)
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        state = init_state(made, optimizer, jax.random.key(0))
    (name,) = state.variables
    assert state.variables[name].dtype == jnp.int32
    assert name not in made.trainable()
    assert made.to_layers(state.variables)["layers/1/attention/own"].tolist() == [0, 1, 2, 3]
