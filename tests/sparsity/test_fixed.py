"""Masks of another run or of magnitude, which stay, as do the weights that they drop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseformer_jax import mesh, presets, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import to_json
from sparseformer_jax.sparsity import fixed, nm
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.init_from import first_state
from sparseformer_jax.training.masks import priors
from sparseformer_jax.training.restore import saved_form
from sparseformer_jax.training.state import ModelDef, TrainState

TARGET = Target(Pattern(2, 4), -2, 2)


def config_of(name, **options):
    config = presets.baseline("tiny")
    config.sparsity = registry.method_config("sparsity", name, **options)
    return config


@pytest.fixture
def one_device():
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        yield


@pytest.fixture
def saved(tmp_path, one_device):
    """A function that saves a run of random arrays as step 3, and returns their masks by layer."""

    def save(config, name):
        model_def, random = ModelDef(config), np.random.default_rng(0)

        def drawn(x):
            value = random.random(x.shape) < 0.5 if x.dtype == bool else random.random(x.shape)
            return jax.device_put(value.astype(x.dtype), x.sharding)

        params, variables = jax.tree.map(drawn, model_def.abstract(jax.sharding.get_mesh()))
        with Checkpoints(tmp_path / name) as checkpoints:
            state = saved_form(model_def, TrainState(3, params, variables))
            checkpoints.save(3, state, Meta({}, "", to_json(config)))
            checkpoints.wait()
        return model_def.to_layers(model_def.masks({**params, **variables}))

    return save


def test_masks_of_another_run(saved, tmp_path):
    """For some of its weights, whatever their pattern and stacks are."""
    expected = saved(config_of("fixed", targets=("ff",)), "source")
    assert len(expected) == 6
    source = f"{tmp_path}/source:3"
    config = config_of("fixed", targets=("layers/1/mlp/(up|down)",), prior=source)
    model_def = ModelDef(config)
    found = model_def.to_layers(priors(model_def))
    assert found.keys() == {"layers/1/mlp/up/kernel", "layers/1/mlp/down/kernel"}
    for name, kept in found.items():
        np.testing.assert_array_equal(kept, expected[name])
        assert 0.4 < kept.mean() < 0.6
    state = model_def.sparsity.init(None, TARGET, None, kept)
    np.testing.assert_array_equal(state["mask"], kept)
    assert priors(ModelDef(config_of("fixed"))) == {}


def test_a_mask_that_nothing_gives_is_one_line(one_device):
    config = config_of("fixed", targets=("ff=2:4", "qkv"))
    with pytest.raises(ConfigError) as error:
        first_state(ModelDef(config), optax.identity(), jax.random.key(0))
    assert str(error.value) == (
        "sparsity.targets='ff=2:4,qkv': layers/0/attention/key/kernel has no pattern and no "
        "mask; write NAMES=n:m, or name a run with masks as sparsity.prior or init_from"
    )


def test_a_given_mask_replaces_that_of_the_run_it_starts_from(saved, tmp_path):
    """Parameters are of one run, masks of another; without a prior masks are the first's too."""
    own = saved(config_of("fixed", targets=("mlp/up",)), "start")
    config = config_of("fixed", targets=("mlp/up",))
    config.init_from = f"{tmp_path}/start"
    state, _ = first_state(ModelDef(config), optax.identity(), jax.random.key(0))
    other = saved(config_of("fixed", targets=("all",)), "masks")
    config.sparsity.prior = f"{tmp_path}/masks"
    model_def = ModelDef(config)
    replaced, _ = first_state(model_def, optax.identity(), jax.random.key(0))
    for name, value in model_def.to_layers(state.variables).items():
        kernel = name.replace("/mask", "/kernel")
        np.testing.assert_array_equal(value, own[kernel])
        given = model_def.to_layers(replaced.variables)[name]
        np.testing.assert_array_equal(given, other[kernel])
        assert not np.array_equal(given, value)


def test_what_is_no_prior_is_one_line(saved, tmp_path):
    saved(config_of("fixed", targets=("ff",)), "source")
    saved(config_of("none"), "dense")

    def refused(name, targets, match, change=lambda config: None):
        config = config_of("maskllm", prior=f"{tmp_path}/{name}", targets=targets)
        change(config)
        model_def = ModelDef(config)
        with pytest.raises(ConfigError, match=match) as error:
            priors(model_def)
        assert str(error.value).startswith(f"sparsity.prior='{tmp_path}/{name}': ")
        assert "\n" not in str(error.value)

    makes = "takes a run with masks, as of `.*sparsity prune`; "
    refused("dense", ("ff=2:4",), f"{makes}.*dense is a dense checkpoint: it has no masks$")
    refused("none", ("ff=2:4",), "none holds no checkpoints")
    refused("source:4", ("ff=2:4",), "no checkpoint of step 4")
    refused(
        "source", ("all=2:4",), "does not fit the model: missing: layers/./attention/.*; take masks"
    )

    def narrow(config):
        config.model.mlp_dim = 64

    message = r"misshapen: layers/0/mlp/.*/kernel is bool\[.*128.*\] instead of bool\[64, 64\]"
    refused("source", ("ff=2:4",), message, narrow)


def test_a_prior_that_stays_is_of_the_pattern(saved, tmp_path):
    """What learned masks start from may be of any."""
    saved(config_of("maskllm", targets=("mlp/up=1:4",)), "source")
    source = {"prior": f"{tmp_path}/source", "targets": ("mlp/up=2:4",)}
    with pytest.raises(ConfigError) as error:
        priors(ModelDef(config_of("fixed", **source)))
    assert str(error.value) == (
        f"sparsity.prior='{tmp_path}/source': its mask of layers/0/mlp/up/kernel is not 2:4, which "
        "sparsity.targets asks for; leave the pattern out to take masks as they are"
    )
    for name, targets in (("fixed", "mlp/up=1:4"), ("fixed", "mlp/up"), ("maskllm", "mlp/up=2:4")):
        assert priors(ModelDef(config_of(name, **source | {"targets": (targets,)})))


def test_masks_of_the_run_it_starts_from_are_of_the_pattern(saved, tmp_path):
    """Those that stay; what follows from weights and step is made anew."""
    saved(config_of("fixed", targets=("mlp/up",)), "start")
    config = config_of("fixed", targets=("mlp/up=2:4",))
    config.init_from = f"{tmp_path}/start"
    with pytest.raises(ConfigError, match=r"^init_from='.*layers/0/mlp/up/kernel is not 2:4,"):
        first_state(ModelDef(config), optax.identity(), jax.random.key(0))
    config.sparsity = registry.method_config("sparsity", "pgf", targets=("mlp/up=2:4",))
    model_def = ModelDef(config)
    state, _ = first_state(model_def, optax.identity(), jax.random.key(0))
    ((name, kept),) = model_def.masks({**state.params, **state.variables}).items()
    np.testing.assert_array_equal(kept, nm.mask(jnp.abs(state.params[name]), 2, 4, -2))


def test_logits_of_other_patterns_are_refused(saved, tmp_path):
    """Of 1:4 they have the shape of those of 3:4."""
    saved(config_of("maskllm", targets=("mlp/up=1:4",)), "start")
    config = config_of("maskllm", targets=("mlp/up=3:4",))
    config.init_from = f"{tmp_path}/start"
    with pytest.raises(
        ConfigError, match=r"^sparsity.targets='mlp/up=3:4': .*learned 'mlp/up=1:4'"
    ):
        first_state(ModelDef(config), optax.identity(), jax.random.key(0))
    config.sparsity.targets = ("mlp/up=1:4",)
    first_state(ModelDef(config), optax.identity(), jax.random.key(0))


def test_magnitude_is_the_prior_where_none_is_given():
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
    method = fixed.Method(fixed.Options())
    kept = method.init(weight, TARGET, None, None)["mask"]
    np.testing.assert_array_equal(kept, nm.mask(jnp.abs(weight), 2, 4, -2))
    assert method.init(weight, Target(None, -2, 2), None, None)["mask"].all()


def test_dropped_weights_stay_as_they_were():
    """The optimiser moves them by its decay and old moments; no gradient reaches them."""
    old = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
    method = fixed.Method(fixed.Options())
    state = method.init(old, TARGET, None, None)
    kept = state["mask"]
    weight, same = method.update(old, old * 0.9, state, TARGET, 1, jnp.float32(0.1))
    np.testing.assert_array_equal(weight, jnp.where(kept, old * 0.9, old))
    assert same is state
    gradient = jax.grad(lambda w: method.apply(w, state, TARGET, 0, None).weight.sum())(old)
    np.testing.assert_array_equal(gradient, kept)
    np.testing.assert_array_equal(method.training_density(Pattern(2, 4), np.arange(3)), [0.5] * 3)
