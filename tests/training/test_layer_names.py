"""Outside the scan a parameter is known by its layer, however layers are grouped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.restore import restore_state, restore_train_state, saved_form
from sparseformer_jax.training.state import ModelDef, abstract_state, init_state

META = Meta(data={"examples": 0}, corpus="text", config="{}")


@pytest.fixture(autouse=True)
def device_mesh():
    """Two devices: half of the tests need sharded parameters, none needs more."""
    device_mesh = mesh.make_mesh({"fsdp": 2}, jax.devices()[:2])
    with jax.set_mesh(device_mesh):
        yield device_mesh


@pytest.fixture
def config(config):
    """Six layers in three stacks, two of them of a unit of two."""
    config.model.num_layers = 6
    return attention(config, "masformer", span_size=32, full_layers=(1, 3))


def attention(config, name, **options):
    config = config.copy_and_resolve_references()
    config.attention = registry.method_config("attention", name, **options)
    return config


def state_of(config):
    model_def = ModelDef(config)
    params = {name: model_def.params[name] for name in model_def.trainable()}
    optimizer = make_optimizer(config.optimizer, 4, params)
    return model_def, optimizer, init_state(model_def, optimizer, jax.random.key(0))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_every_layer_has_its_own_names(config):
    model_def = ModelDef(config)
    names = {layer for name in model_def.params for layer in model_def.names.of(name)}
    by_layer = {name for name in names if name.startswith("layers/")}
    assert names - by_layer == {"embedding/table", "final_norm/scale"}
    own = {name.removeprefix("layers/0/") for name in by_layer if name.startswith("layers/0/")}
    assert "attention/query/kernel" in own
    assert by_layer == {f"layers/{layer}/{name}" for layer in range(6) for name in own}


def test_entries_are_those_of_the_stack_in_layer_order(config):
    """Layers 0 to 3 are a unit of two, twice; 4 and 5 are a stack."""
    model_def = ModelDef(config)
    stacked = {name: jnp.arange(v.shape[0]) for name, v in model_def.params.items()}
    layers = model_def.to_layers(stacked)
    rows = [int(layers[f"layers/{layer}/mlp/up/kernel"]) for layer in range(6)]
    assert rows == [0, 0, 1, 1, 0, 1]
    assert len({name.split("/unit")[0] for name in stacked if name.startswith("stacks")}) == 2


def test_states_come_back_from_their_layers(config):
    config.optimizer.name = "muon"
    model_def, _, state = state_of(config)
    layers = model_def.to_layers(state)
    assert "stacks" not in str(jax.tree_util.tree_structure(layers))
    assert_equal(model_def.from_layers(layers), state)


def test_a_seed_gives_the_same_layers_to_every_method(config):
    masformer, dense = ModelDef(config), ModelDef(attention(config, "dense"))
    values = [m.to_layers(m.init(jax.random.key(3))[0]) for m in (masformer, dense)]
    assert_equal(*values)


def test_dropout_does_not_depend_on_the_grouping(config):
    """Spans of the whole sequence are dense attention, in stacks of their own."""
    tokens = jax.device_put(
        np.arange(64, dtype=np.int32).reshape(2, 32),
        jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec("batch", "seq")),
    )
    logits = []
    for each in (config, attention(config, "dense")):
        model_def = ModelDef(each)

        @jax.jit
        def run(params, rng, model_def=model_def):
            return model_def.model(params, {}, 0)(tokens, rng=rng).logits

        params, _ = model_def.init(jax.random.key(0))
        logits.append([run(params, jax.random.key(1)), run(params, jax.random.key(2))])
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert float(jnp.abs(logits[0][0] - logits[0][1]).max()) > 0.1


def test_layers_that_train_apart_stack_apart(config):
    whole = ModelDef(attention(config, "dense"))
    config = attention(config, "dense")
    config.train.trainable = r"layers/[45]/mlp/"
    model_def, _, state = state_of(config)
    trainable = [layer for name in model_def.trainable() for layer in model_def.names.of(name)]
    parts = ("mlp/down/kernel", "mlp/gate/kernel", "mlp/up/kernel")
    assert sorted(trainable) == [f"layers/{layer}/{part}" for layer in (4, 5) for part in parts]
    moments = model_def.to_layers(state.opt_state[0].mu)
    assert moments.keys() == set(trainable)
    assert_equal(
        model_def.to_layers(state.params), whole.to_layers(whole.init(jax.random.key(0))[0])
    )


def test_a_pattern_that_matches_nothing_shows_names_by_layer(config):
    config.train.trainable = "stacks/0"
    with pytest.raises(ConfigError, match=r"trainable='stacks/0' .*layers/0/attention/key/kernel"):
        ModelDef(config).trainable()


def save(workdir, state):
    with Checkpoints(workdir, keep_last=1) as checkpoints:
        checkpoints.save(0, state, META)
        checkpoints.wait()


def assert_placed(array, abstract):
    assert array.sharding == abstract.sharding, (array.sharding, abstract.sharding)


def restored(config, workdir):
    model_def, optimizer, _ = state_of(config)
    abstract = abstract_state(model_def, optimizer, jax.sharding.get_mesh())
    with Checkpoints(workdir) as checkpoints:
        state = restore_train_state(model_def, checkpoints, 0, abstract)
    jax.tree.map(assert_placed, state, abstract)
    return model_def.to_layers(state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.representative("adamw")
def test_checkpoints_know_layers_only(config, tmp_path, optimizer):
    """What masformer saved, dense attention opens, whose layers are one stack."""
    config.optimizer.name = optimizer
    model_def, _, state = state_of(config)
    save(tmp_path, saved_form(model_def, state))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.arrays(0).keys() == model_def.to_layers(state.params).keys()
    assert_equal(restored(attention(config, "dense"), tmp_path), model_def.to_layers(state))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.representative("adamw")
def test_checkpoints_from_before_names_by_layer_open(config, tmp_path, optimizer):
    """They hold stacked arrays, and nothing beside parameters and optimiser."""
    config.optimizer.name = optimizer
    model_def, _, state = state_of(config)
    save(tmp_path, {name: part for name, part in vars(state).items() if name != "variables"})
    assert_equal(restored(attention(config, "dense"), tmp_path), model_def.to_layers(state))
    evaluated = restore_state(model_def, tmp_path)
    assert_equal(evaluated.params, state.params)
    assert evaluated.variables == {}


def test_what_does_not_fit_is_listed(config, tmp_path):
    model_def, _, state = state_of(config)
    save(tmp_path, saved_form(model_def, state))
    config.model.num_layers = 5
    with pytest.raises(ConfigError, match="left over: layers/5/.* and 5 more$"):
        restore_state(ModelDef(config), tmp_path)
    config.model.num_layers, config.model.mlp_bias = 6, True
    config.model.embed_dim = 16
    with pytest.raises(ConfigError, match="missing: .*mlp.*bias.* more; misshapen: ") as error:
        restore_state(ModelDef(config), tmp_path)
    assert r"embedding/table is float32[264, 32] instead of float32[264, 16]" in str(error.value)
