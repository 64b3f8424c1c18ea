"""What every method of weight sparsity keeps to, new ones too.

A method is tested in small settings of its own, or else in its defaults. What training makes of
weights and masks depends on no mesh, number of pieces or recomputation; every state is that of
hard masks to evaluation; checkpoints hold all of it bit for bit.
"""

import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh, presets, registry
from sparseformer_jax.sparsity import nm
from sparseformer_jax.sparsity.layers import weight_key
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.restore import restore_train_state, saved_form
from sparseformer_jax.training.state import ModelDef, abstract_state
from sparseformer_jax.training.step import _sparsity_key, make_train_step
from tests.model.harness import assert_close
from tests.training.steps import packed_batch, train

# FSDP cuts what "up" sums over, tensor parallelism its outputs and the heads of "out".
TARGETS = ("mlp/up/kernel$=2:4", "attention/out/kernel$=1:4")

# Method, its options and what trains. The phases of each change between steps 1 and 4.
CASES = {
    "fixed": ("fixed", {"targets": ("all=2:4",)}, "all"),
    "maskllm": ("maskllm", {"schedule_steps": 3}, "/mask_logits$"),
    "maskllm-weights": ("maskllm", {"schedule_steps": 3, "straight_through": True}, "all"),
    "pgf-mdgf_linear": (
        "pgf",
        {"recipe": "mdgf_linear", "decay_steps": 3, "pruned_grad": "straight_through"},
        "all",
    ),
    "pgf-mdgf_exponential": (
        "pgf",
        {"recipe": "mdgf_exponential", "dense_steps": 1, "decay_steps": 2},
        "all",
    ),
    "pgf-sdgf_stepwise": (
        "pgf",
        {"recipe": "sdgf_stepwise", "dense_steps": 1, "decay_steps": 2, "moments": "reset"},
        "all",
    ),
    "pgf-sdgf_geometric": ("pgf", {"recipe": "sdgf_geometric", "decay_steps": 4}, "all"),
    "pgf-sr_ste": ("pgf", {"recipe": "sr_ste", "dense_steps": 1}, "all"),
    "pgf-sr_ste_decoupled": ("pgf", {"recipe": "sr_ste", "sr_ste_decoupled": True}, "all"),
}
_covered = {name for name, _, _ in CASES.values()} | {"none"}
CASES |= {name: (name, {}, "all") for name in registry.names("sparsity") if name not in _covered}

NUM_STEPS = 4
ON_DEVICES = {"fsdp": 2, "tensor": 2}

representative = pytest.mark.representative("maskllm", "pgf-sdgf_stepwise")


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def config_of(case, **changes):
    name, options, trainable = CASES[case]
    config = dense_config()
    # Eight times the group, of which fsdp leaves half of the width to a device.
    targets = ("mlp/up/kernel$=1:2",) if options.get("recipe") == "sdgf_geometric" else TARGETS
    options = {"targets": targets} | options | changes
    config.sparsity = registry.method_config("sparsity", name, **options)
    config.train.trainable = trainable
    return config


def dense_config():
    config = presets.baseline("tiny")
    config.attention = registry.method_config(
        "attention", "s2", block_size=8, local_blocks=1, vert_stride=2
    )
    config.model.embed_dim = 32
    config.model.head_dim = 8
    config.model.mlp_dim = 48
    config.data.seq_len = 32
    config.train.accumulation_steps = 1
    config.optimizer.warmup_steps = 0
    config.optimizer.eps = 1e-4  # or AdamW divides rounding by rounding
    return config


@functools.cache
def batch():
    return packed_batch(250, rows=8)


@functools.cache
def after(case, num_steps):
    """Losses, last metrics and the state after some steps on one device."""
    config = dense_config() if case == "dense" else config_of(case)
    return train(config, {}, batch(), num_steps=num_steps)


def masks(config, state):
    """The hard masks of all targets, with the targets."""
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        found = jax.jit(model_def.masks)({**state.params, **state.variables})
        return jax.device_get(found), model_def.targets


@pytest.mark.representative("maskllm")
def test_training_depends_on_the_batch_alone(case):
    """Four devices in two pieces with recomputation, and one at once without."""
    config = config_of(case)
    losses, metrics, state = after(case, NUM_STEPS - 1)
    config.train.accumulation_steps, config.model.remat = 2, "full"
    others = train(config, ON_DEVICES, batch(), num_steps=NUM_STEPS - 1)
    expected = metrics["total_loss"], metrics["grad_norm"], losses
    found = others[1]["total_loss"], others[1]["grad_norm"], others[0]
    np.testing.assert_allclose(np.hstack(found), np.hstack(expected), rtol=1e-4)
    assert_close(others[2].params, state.params, 1e-3)
    kept, _ = masks(config, state)
    jax.tree.map(np.testing.assert_array_equal, masks(config, others[2])[0], kept)


@representative
def test_every_state_keeps_n_of_m(case):
    """Of the pattern that its step has, and in the end of the target's own."""
    config = config_of(case)
    for num_steps in range(1, NUM_STEPS + 1):
        kept, targets = masks(config, after(case, num_steps)[2])
        for name, target in targets.items():
            pattern = pattern_at(case, target.pattern, num_steps)
            assert nm.holds(kept[name], pattern, target.axis), name
            assert num_steps < NUM_STEPS or pattern == target.pattern


def pattern_at(case, target, step):
    if not case.startswith("pgf"):
        return target
    name, options, _ = CASES[case]
    method = registry.method("sparsity", name)
    stages = method.stages(method.Options(**options), target)
    return [stage.pattern for stage in stages if stage.first_step <= step][-1]


@functools.cache
def dense_features():
    return features(ModelDef(dense_config()))


def features(model_def):
    def run(params, variables, inputs):
        return model_def.model(params, variables, 0).features(inputs).hidden

    return jax.jit(run)


@representative
def test_evaluation_is_that_of_zeros_in_a_dense_model(case):
    config = config_of(case)
    state = after(case, NUM_STEPS)[2]
    kept, _ = masks(config, state)
    inputs = batch()["inputs"]
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        found = features(model_def)(state.params, state.variables, inputs)
        dense = {
            name: np.where(kept[name], x, 0) if name in kept else x
            for name, x in state.params.items()
            if name in ModelDef(dense_config()).params
        }
        np.testing.assert_array_equal(found, dense_features()(dense, {}, inputs))


@representative
def test_a_checkpoint_goes_on_with_equal_floats_and_opens_on_another_mesh(case, tmp_path):
    """Across a change of phase, with the noise of the steps after it."""
    config, start = config_of(case), after(case, NUM_STEPS - 2)[2]
    model_def = ModelDef(config)
    params = {name: model_def.params[name] for name in model_def.trainable()}
    optimizer = make_optimizer(config.optimizer, 10, params)
    restored = []
    with Checkpoints(tmp_path) as checkpoints:
        for sizes in ({}, {"fsdp": 4, "tensor": 2}):
            devices = jax.devices()[: 8 if sizes else 1]
            with jax.set_mesh(mesh.make_mesh(sizes, devices)):
                abstract = abstract_state(model_def, optimizer, jax.sharding.get_mesh())
                if not sizes:
                    state = jax.tree.map(
                        lambda x, a: jax.device_put(x, a.sharding), start, abstract
                    )
                    meta = Meta({}, "", "{}")
                    checkpoints.save(2, saved_form(model_def, state), meta)
                    checkpoints.wait()
                restored.append(restore_train_state(model_def, checkpoints, 2, abstract))
    for state in restored:
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), start)
    losses, _, end = train(config, {}, batch(), num_steps=2, state=restored[0])
    expected = after(case, NUM_STEPS)
    assert losses == expected[0][-2:]
    jax.tree.map(np.testing.assert_array_equal, end, expected[2])


def test_a_dense_phase_is_a_dense_run():
    """Loss, gradient and new parameters, bit for bit; without sparsity there is no more."""
    (losses,), metrics, state = after("dense", 1)
    assert not state.variables
    sparse_losses, sparse_metrics, sparse = after("pgf-sdgf_stepwise", 1)
    assert sparse_losses == [losses]
    assert metrics.keys() < sparse_metrics.keys()
    jax.tree.map(np.testing.assert_array_equal, sparse.params, state.params)


@pytest.mark.exhaustive
@pytest.mark.parametrize("pattern", ["4:4", "1:1"])
def test_masks_that_keep_all_are_a_dense_run(pattern):
    config = dense_config()
    config.sparsity = registry.method_config("sparsity", "fixed", targets=(f"all={pattern}",))
    losses, _, state = train(config, {}, batch(), num_steps=3)
    expected, _, dense = after("dense", 3)
    assert losses == expected
    jax.tree.map(np.testing.assert_array_equal, state.params, dense.params)


def test_frozen_weights_stay():
    first, last = (after("maskllm", n)[2].params for n in (1, NUM_STEPS))
    moved = {name for name, x in last.items() if not np.array_equal(x, first[name])}
    assert moved == {name for name in last if name.endswith("/mask_logits")} != set()
    start = after("dense", 1)[2].params
    config = config_of("maskllm")
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        drawn, _ = jax.device_get(jax.jit(ModelDef(config).init)(jax.random.key(0)))
    assert start.keys() == last.keys() - moved
    for name in start:
        np.testing.assert_array_equal(last[name], drawn[name])


def test_moments_of_what_a_mask_takes_or_drops_are_forgotten():
    config = config_of("pgf-sdgf_stepwise")
    before, state = (after("pgf-sdgf_stepwise", n)[2] for n in (2, 3))
    old, new = (masks(config, each)[0] for each in (before, state))
    for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
        for name, kept in new.items():
            changed = kept != old[name]
            assert changed.any()
            assert not moments[name][changed].any()
            assert moments[name][kept & ~changed].all()


def test_no_mask_of_all_layers_is_ever_there():
    """Under remat, besides what training is given: no array of a weight's stacked shape."""
    config = config_of("maskllm")
    config.model.num_layers, config.model.remat = 5, "full"
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        params = {name: model_def.params[name] for name in model_def.trainable()}
        optimizer = make_optimizer(config.optimizer, 10, params)
        abstract = abstract_state(model_def, optimizer, jax.sharding.get_mesh())
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec(None, "batch", "seq"))
        rows = {
            name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=sharding)
            for name, x in batch().items()
        }
        step = make_train_step(model_def, optimizer, make_schedule(config.optimizer, 10))
        made = shapes(jax.make_jaxpr(step)(abstract, rows).jaxpr)
    stacked = {model_def.params[name].shape for name in model_def.targets}
    logits = {model_def.params[name].shape for name in params}
    assert logits <= made  # their gradients are
    assert not stacked & made
    assert {shape[1:] for shape in stacked} <= made  # of one layer


def shapes(jaxpr):
    """The shapes of all numbers that a program makes, at any depth, and not only hands on."""
    found = {
        out.aval.shape
        for equation in jaxpr.eqns
        for out in equation.outvars
        if jnp.issubdtype(out.aval.dtype, jnp.floating) and equation.primitive.name != "reshard"
    }
    inner = (jax.extend.core.jaxprs_in_params(equation.params) for equation in jaxpr.eqns)
    return found.union(*map(shapes, itertools.chain.from_iterable(inner)))


def test_layers_of_two_kinds_see_their_own_weights():
    """Equal to a dense model with the weights that the method makes one by one."""
    config = config_of("maskllm", targets=("layers/0/mlp/up=2:4", "layers/1/attention/out=1:4"))
    config.attention = registry.method_config("attention", "masformer", span_size=8, full_layers=(1,))  # fmt: skip
    dense = config.copy_and_resolve_references()
    dense.sparsity = registry.method_config("sparsity", "none")
    dense.train.trainable = "all"
    key, step, inputs = jax.random.key(5), 1, jnp.asarray(batch()["inputs"])
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def, dense_def = ModelDef(config), ModelDef(dense)
        params, variables = jax.jit(model_def.init)(jax.random.key(0))

        @jax.jit
        def run(params, variables, key):
            model = model_def.model(params, variables, step, key)
            return model.features(inputs).hidden

        @jax.jit
        def run_dense(params, key):
            layers = model_def.to_layers(params)
            targets = {model_def.names.of(n)[0]: t for n, t in model_def.targets.items()}
            assert len(targets) == 2
            for name, target in targets.items():
                _, number, path = name.removesuffix("/kernel").split("/", 2)
                state = {"mask_logits": layers.pop(f"layers/{number}/{path}/mask_logits")}
                own = weight_key(jax.random.fold_in(key, int(number)), path)
                applied = model_def.sparsity.apply(layers[name], state, target, step, own)
                layers[name] = applied.weight
            model = dense_def.model(dense_def.from_layers(layers), {}, step)
            return model.features(inputs).hidden

        found = run(params, variables, key)
        assert_close(found, run_dense(params, key), 1e-6)
        assert not np.allclose(run(params, variables, jax.random.key(6)), found, rtol=1e-3)


def test_every_step_draws_noise_of_its_own():
    """None that dropout draws, in that step or in any other."""
    model_def = ModelDef(config_of("maskllm"))
    steps = jnp.arange(8)
    own = jax.vmap(lambda step: _sparsity_key(model_def, step))(steps)
    others = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(model_def.config.seed), steps)
    drawn = jax.random.key_data(jnp.concatenate([own, others]))
    assert len(np.unique(drawn, axis=0)) == 16
