"""What training with SeerAttention costs."""

import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from sparseformer_jax import describe, mesh, registry
from sparseformer_jax.attention import seer
from sparseformer_jax.attention._gate_cost import gate_flops
from sparseformer_jax.attention.inputs import Shard
from sparseformer_jax.evaluation.perplexity import make_eval_step
from sparseformer_jax.training.state import ModelDef
from tests.attention.seer_cases import GATES, inputs_of, kinds, make, states

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "seer.py"


@pytest.mark.representative("prefill*")
@pytest.mark.parametrize(("kind", "kept"), [("prefill", 1), ("group", 3)])
def test_where_gates_alone_train_a_step_is_a_forward_pass_and_theirs(kind, kept):
    """Compiled: a loop over layers counts once, and memory is kept for each of them."""

    def compiled(num_layers):
        config = runpy.run_path(str(CONFIG))["get_config"]("tiny")
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


@kinds
def test_the_cost_of_gates_is_that_of_their_products(kind, monkeypatch):
    """But for the target's, in which tiles are whole."""
    attention, length = make(kind), 45
    inputs = inputs_of(attention, states(attention, 0, 1, length))
    graphdef, gate, rest = nnx.split(attention, lambda path, _: path[0] == "gate", ...)

    def even(self, inputs, shard, lse, scored):
        seen = jnp.broadcast_to(scored.past | scored.own, scored.scores.shape)
        return seen / jnp.sum(seen, axis=-1, keepdims=True), seen

    def loss(gate):
        module = nnx.merge(graphdef, gate, rest)
        lse = jnp.zeros(inputs.query.shape[:3])
        return jnp.sum(module._rows(inputs, Shard(num_heads=4), lse)["loss"])

    monkeypatch.setattr(seer.Method, "_target", even)
    for is_training, function in ((False, loss), (True, jax.value_and_grad(loss))):
        found = 2 * products(jax.make_jaxpr(function)(gate).jaxpr)
        expected = gate_flops(attention.options, attention.config, length, is_training=is_training)
        assert found == pytest.approx(length * expected)


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
