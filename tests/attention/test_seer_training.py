"""Training with SeerAttention: what it costs, and gates and weights that learn together."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from sparseformer_jax import config as config_lib
from sparseformer_jax import config_flags, describe, mesh, registry
from sparseformer_jax.attention import _block_choice
from sparseformer_jax.attention._gate_cost import gate_flops
from sparseformer_jax.attention._gate_scores import scored_by
from sparseformer_jax.attention.inputs import Shard
from sparseformer_jax.config import validate
from sparseformer_jax.evaluation.perplexity import make_eval_step
from sparseformer_jax.model.rotary import rotary
from sparseformer_jax.model.stack import rematerialized
from sparseformer_jax.training import loop
from sparseformer_jax.training.by_layer import ByLayer
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.init_from import first_state
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.restore import saved_form
from sparseformer_jax.training.state import ModelDef, abstract_state
from sparseformer_jax.training.step import make_train_step
from tests.attention.comparison import assert_same_on_mesh
from tests.attention.seer_cases import (
    GATES,
    SIZE,
    choice,
    inputs_of,
    kinds,
    make,
    states,
    token_mask,
)
from tests.model import reference
from tests.model.harness import assert_close, in_float64, normal, packed, pure

SHARD = Shard(num_heads=4)
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "seer.py"


@pytest.mark.representative("prefill*")
@pytest.mark.parametrize(("kind", "kept"), [("prefill", 1), ("group", 3)])
def test_where_gates_alone_train_a_step_is_a_forward_pass_and_theirs(kind, kept):
    """Compiled: a loop over layers counts once, and memory is kept for each of them."""

    def compiled(num_layers):
        config = config_flags.load(f"{CONFIG}:tiny")
        options = GATES[kind] | {"block_size": 16}
        config.attention = registry.method_config("attention", "seer", **options)
        config.model.num_layers = num_layers
        with jax.set_mesh(mesh.make_mesh({"data": 8})):
            model_def = ModelDef(config)
            assert all("/attention/gate/" in name for name in model_def.trainable())
            return config, model_def, describe.compile_step(config, model_def)

    config, model_def, (step, state) = compiled(2)
    with jax.set_mesh(mesh.make_mesh({"data": 8})):
        device_mesh = jax.sharding.get_mesh()
        batch = describe.abstract_batch(config, device_mesh)
        place = jax.NamedSharding(device_mesh, mesh.spec("batch", "seq"))
        batch = {
            name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)
            for name, x in batch.items()
        }
        forward = jax.jit(make_eval_step(model_def)).lower(state, batch).compile()
        cost = describe.costs(config, model_def)
        assert cost.training_flops == cost.forward_flops + cost.own_flops
    flops = step.cost_analysis()["flops"]
    forward_flops = forward.cost_analysis()["flops"]
    own_flops = cost.own_flops * config.data.seq_len / 2  # of a device's row, in one layer
    assert forward_flops < flops < 1.15 * forward_flops + own_flops
    assert "no gradient goes through the model" in describe.describe(config)
    # A backward pass keeps some 30 residual streams of a layer; gates what they pool, or queries
    # and the target.
    _, _, (deep, _) = compiled(6)
    growth = deep.memory_analysis().temp_size_in_bytes - step.memory_analysis().temp_size_in_bytes
    stream = 4 * config.data.seq_len * config.model.embed_dim
    assert growth < 4 * kept * stream


CHOICES = {
    "prefill": {"density": 0.4},
    "double": {"threshold": 0.15},
    "group": {"token_budget": 2 * SIZE},
}


def joint_gradients(module, arrays, weights, remat="none"):
    """Of what weighs a module's output, and its loss, by its variables and its input."""

    def total(variables, x, positions, ids):
        module = nnx.merge(graphdef, variables)
        attended = module(x, positions, ids, rng=jax.random.key(0))
        return jnp.vdot(weights, attended.output) + attended.losses["gate"], attended

    graphdef, variables = nnx.split(module)
    total = rematerialized(total, remat)
    (of_module, of_x), attended = jax.jit(jax.grad(total, (0, 1), has_aux=True))(variables, *arrays)
    return (nnx.to_pure_dict(of_module), of_x), attended.output


@pytest.fixture(scope="module")
def arrays():
    """Packed states, their positions and documents, and weights of outputs."""
    ids, positions = (jnp.asarray(x) for x in packed(np.random.default_rng(0), 2, 45))
    x = states(make("prefill"), 0, *ids.shape)
    return (x, positions, ids), jnp.asarray(normal(1, *x.shape))


@pytest.mark.representative("prefill")
@pytest.mark.parametrize("kind", CHOICES)
def test_jointly_weights_learn_from_chosen_blocks_and_gates_from_all(kind, arrays):
    (x, positions, ids), weights = arrays
    joint, apart = (make(kind, joint=is_joint, **CHOICES[kind]) for is_joint in (True, False))
    (found, of_x), output = joint_gradients(joint, *arrays)
    _, chosen, _ = choice(joint, inputs_of(joint, *arrays[0]))
    visible = np.tri(x.shape[1], dtype=bool) & reference.same_segment(np.asarray(ids))
    mask = token_mask(kind, chosen, x.shape[1]) & visible
    assert mask.mean() < 0.8 * visible.mean()

    def masked(parameters, x):
        output = reference.attention(parameters, x, positions, mask, joint.config)
        return jnp.vdot(weights, output), output

    truth, expected = in_float64(jax.grad(masked, (0, 1), has_aux=True), pure(joint), x)
    (distilled, _), _ = joint_gradients(apart, arrays[0], jnp.zeros_like(weights))
    assert_close(found.pop("gate"), distilled.pop("gate"), 1e-5)
    assert not any(map(np.any, jax.tree.leaves(distilled)))
    del truth[0]["gate"]
    assert_close(((found, of_x), output), (truth, expected), 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("remat", ["full", "dots_saveable"])
@pytest.mark.parametrize("kind", ["prefill", "group"])
def test_jointly_recomputing_changes_nothing(kind, remat, arrays):
    joint = make(kind, joint=True, **CHOICES[kind])
    expected = joint_gradients(joint, *arrays)
    assert_close(joint_gradients(joint, *arrays, remat), expected, 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("prefill", {"tensor": 2, "context": 2, "data": 2}), ("group", {"context": 8})],
)
def test_jointly_all_meshes_learn_alike(kind, sizes):
    joint = make(kind, joint=True, **CHOICES[kind])
    assert_same_on_mesh(joint, sizes, 32, rng=jax.random.key(0))


def test_a_longer_context_starts_from_distilled_gates(tmp_path):
    """Which turn by the scaled frequencies, as the model's own queries do."""
    config = config_flags.load(f"{CONFIG}:extend")
    validate(config, num_devices=8)
    sizes = config_flags.load(f"{CONFIG}:tiny")
    config.update(data=sizes.data, eval=sizes.eval, mesh=sizes.mesh)
    for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim"):
        config.model[name] = sizes.model[name]
    config.model.mlp_dim = sizes.model.mlp_dim
    config.attention.block_size = 16
    short = config_lib.from_json(config_lib.to_json(config))
    short.model.rope_scaling = "none"
    short.attention.joint = False
    config.init_from = str(tmp_path)
    with jax.set_mesh(mesh.make_mesh({"data": 8})):
        before = first(short)[1]
        meta = Meta(data={"examples": 0}, corpus="text", config=config_lib.to_json(short))
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(7, saved_form(ModelDef(short), before), meta)
            checkpoints.wait()
        config.seed = 1  # nothing is drawn
        model_def, after, (note,) = first(config)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert set(after.opt_state[0].mu) == set(after.params)
    assert "model.rope_scaling" in note
    assert "initialised" not in note
    gate = next(model_def.abstract_model().attention_layers()).gate
    x, positions = jnp.asarray(normal(0, 1, 3, 4, 16)), 9000 * jnp.arange(3)[None]
    turned = rotary(x, positions, model_def.abstract_model().config)
    np.testing.assert_array_equal(gate.queries(x, positions), turned)
    plain = dataclasses.replace(model_def.abstract_model().config, rope_scaling="none")
    assert np.abs(turned - rotary(x, positions, plain)).max() > 0.1


def first(config):
    """The model of a config, its first state, and what is told of that."""
    model_def = ModelDef(config)
    params = {name: model_def.params[name] for name in model_def.trainable()}
    optimizer = make_optimizer(config.optimizer, config.train.num_steps, params)
    return model_def, *first_state(model_def, optimizer, jax.random.key(config.seed))


def test_layers_with_gates_report_one_by_one():
    config = config_flags.load(f"{CONFIG}:tiny")
    config.model.num_layers = 3
    config.attention.update(window_size=8, window_layers=(1,))
    with jax.set_mesh(mesh.make_mesh({"data": 8})):
        model_def = ModelDef(config)
        optimizer, schedule = optax.sgd(1.0), optax.constant_schedule(1.0)
        state = abstract_state(model_def, optimizer, jax.sharding.get_mesh())
        batch = describe.abstract_batch(config, jax.sharding.get_mesh())
        _, metrics = jax.eval_shape(make_train_step(model_def, optimizer, schedule), state, batch)
    by_layer = ByLayer(model_def.abstract_model())
    values = {name: np.arange(*x.shape) for name, x in metrics["layers"].items()}
    named = by_layer.named(values)
    for name in ("kl", "recall", "mass", "gate_density", "overflow"):
        assert metrics[name].shape == ()
        assert (named[f"{name}/layer_0"], named[f"{name}/layer_2"]) == (0, 1)
        assert f"{name}/layer_1" not in named


@pytest.mark.exhaustive
def test_a_run_logs_its_layers(tmp_path):
    config = config_flags.load(f"{CONFIG}:tiny")
    config.train.num_steps, config.optimizer.warmup_steps = 2, 1
    config.eval.num_batches = 1
    loop.train(config, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for kind, names in (
        ("train", ("kl", "recall", "mass")),
        ("eval", ("gate_density", "overflow")),
    ):
        line = next(line for line in lines if f"{kind}/loss" in line)
        for name in names:
            layers = [line[f"{kind}/{name}/layer_{i}"] for i in range(2)]
            assert line[f"{kind}/{name}"] == pytest.approx(np.mean(layers))
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert b"train/recall/layer_1" in events.read_bytes()


@kinds
def test_the_cost_of_gates_is_that_of_their_products(kind):
    attention, length = make(kind), 45
    inputs = inputs_of(attention, states(attention, 0, 1, length))
    graphdef, gate, rest = nnx.split(attention, lambda path, _: path[0] == "gate", ...)

    def loss(gate):
        scored = scored_by(nnx.merge(graphdef, gate, rest).gate, inputs, SHARD)
        target, visible = jnp.ones(scored.scores.shape), scored.past | scored.own
        return jnp.sum(_block_choice.divergence(target, scored.scores, visible))

    for is_training, function in ((False, loss), (True, jax.value_and_grad(loss))):
        found = 2 * products(jax.make_jaxpr(function)(gate).jaxpr)
        expected = gate_flops(attention.options, attention.config, length, is_training=is_training)
        assert found == pytest.approx(length * expected)


def test_jointly_a_step_costs_what_is_chosen_and_dense_attention_for_the_target():
    apart, joint = (make("prefill", density=0.4, joint=is_joint) for is_joint in (False, True))
    before, after = (attention.cost(64, is_training=True) for attention in (apart, joint))
    assert (before.density, after.density) == (1, joint.density(64))
    product = 2 * joint.config.num_heads * joint.config.head_dim * 65 / 2
    assert after.own - before.own == pytest.approx(2 * product)
    assert joint.cost(64, is_training=False) == apart.cost(64, is_training=False)


def products(jaxpr):
    """Multiplications of all matrix products; of a loop of unknown length once."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            lengths = (equation.invars[0].aval.shape[axis] for axis in contracted)
            count += math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            count += repeats * products(inner)
    return count
