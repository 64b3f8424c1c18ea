"""Phases as functions of the step, what reaches dropped weights, and when masks change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import presets, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import validate
from sparseformer_jax.sparsity import nm, pgf
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.weight_sparsity import _reset

TARGET = Target(Pattern(1, 4), -2, 2)


def weight(seed=0, shape=(8, 6)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def patterns(recipe, target, **options):
    stages = pgf.stages(pgf.Options(recipe=recipe, **options), Pattern.parse(target))
    return [(stage.first_step, str(stage.pattern)) for stage in stages]


def test_structure_decay_ends_at_every_target():
    """Also where halves of m do not come to n."""
    steps = {"dense_steps": 10, "decay_steps": 90}
    assert patterns("sdgf_stepwise", "3:8", **steps) == [
        (0, "8:8"), (10, "7:8"), (55, "4:8"), (100, "3:8"),
    ]  # fmt: skip
    assert patterns("sdgf_stepwise", "1:2", **steps)[1:] == [(10, "1:2"), (55, "1:2"), (100, "1:2")]
    assert patterns("sdgf_stepwise", "3:4", **steps) == [(0, "4:4"), (10, "3:4")]
    assert patterns("sdgf_geometric", "1:2", **steps)[-2:] == [(77, "1:2"), (100, "1:2")]
    for recipe in ("sr_ste", "mdgf_linear", "mdgf_exponential"):
        assert patterns(recipe, "2:4", **steps) == [(0, "4:4"), (10, "2:4")]
        assert patterns(recipe, "2:4", decay_steps=90) == [(0, "2:4")]


@pytest.mark.parametrize("recipe", ["mdgf_linear", "mdgf_exponential"])
def test_mask_decay_is_one_while_dense_and_none_when_hard(recipe):
    """However long the dense phase is beside the decay: gradients are finite."""
    options = pgf.Options(recipe=recipe, dense_steps=10**6, decay_steps=20)
    factors = jax.vmap(lambda step: pgf.pruned_factor(options, step))(
        10**6 + jnp.array([-(10**6), -1, 0, 19, 20, 10**6])
    )
    expected = 0.05 if recipe == "mdgf_linear" else 1000 ** (-19 / 20)
    np.testing.assert_allclose(factors, [1, 1, 1, expected, 0, 0], rtol=1e-5)
    method, kept = pgf.Method(options), jnp.ones((8, 6), bool)

    def output(weight, step):
        return method.apply(weight, {"mask": kept}, TARGET, step, None).weight.sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(output))(weight(), 0), np.ones((8, 6)))


def test_decoupled_decay_is_the_learning_rates_share_of_what_is_dropped():
    """After the optimiser, and in no gradient; the next mask is that of the decayed weight."""
    options = pgf.Options(recipe="sr_ste", sr_ste_weight=0.5, sr_ste_decoupled=True)
    method, old = pgf.Method(options), weight()
    kept = nm.mask(jnp.abs(old), 1, 4, -2)
    assert not method.apply(old, {"mask": kept}, TARGET, 3, None).losses
    update = jax.jit(lambda w, rate: method.update(old, w, {"mask": kept}, TARGET, 4, rate))
    new, state = update(old, jnp.float32(0.1))
    np.testing.assert_allclose(new, np.where(kept, old, 0.95 * old), rtol=1e-6)
    np.testing.assert_array_equal(state["mask"], kept)


def test_masks_wait_for_their_turn_unless_the_pattern_changes():
    options = pgf.Options(
        recipe="sdgf_stepwise", dense_steps=4, decay_steps=6, mask_every=5
    )  # 4:4 to step 4, 3:4, 2:4 from 6, 1:4 from 8
    method, state = pgf.Method(options), {"mask": jnp.ones((8, 6), bool)}
    update = jax.jit(
        lambda w, state, step: method.update(w, w, state, TARGET, step, jnp.float32(0))[1]
    )
    changes, kept = [], []
    for step in range(1, 16):
        new = update(weight(step), state, step)
        if not np.array_equal(new["mask"], state["mask"]):
            changes.append(step)
        kept.append(int(new["mask"].sum()))
        state = new
    assert changes == [4, 5, 6, 8, 10, 15]
    assert kept == [48] * 3 + [36] * 2 + [24] * 2 + [12] * 8


@pytest.mark.parametrize(
    ("options", "density"),
    [
        # Dense, decaying, hard: products of output and input, then that of the weight.
        ({"recipe": "mdgf_exponential"}, [1, 1, 1 / 4]),
        ({"recipe": "mdgf_linear", "decay_rate": 0.5}, [1, 1 / 4, 1 / 4]),
        ({"recipe": "mdgf_exponential", "pruned_grad": "blocked"}, [1, 0.75, 1 / 4]),
        ({"recipe": "mdgf_exponential", "pruned_grad": "straight_through"}, [1, 1, 0.5]),
        ({"recipe": "sr_ste"}, [1, 0.5, 0.5]),
        ({"recipe": "sdgf_stepwise"}, [1, 0.5, 1 / 4]),
        ({"recipe": "sdgf_geometric"}, [1, 1 / 4, 1 / 4]),
    ],
)
def test_the_dense_part_of_training_flops(options, density):
    """Of 1:4 before, in the middle of and after the decay."""
    method = pgf.Method(pgf.Options(dense_steps=10, decay_steps=10, **options))
    found = method.training_density(Pattern(1, 4), np.array([9, 15, 20]))
    np.testing.assert_allclose(found, density)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": 0}, "decay_steps=0: must be at least 1"),
        ({"dense_steps": -1}, "dense_steps=-1: must be"),
        ({"mask_every": 0}, "mask_every=0: must be"),
        ({"decay_rate": 0.0}, "decay_rate=0.0: must be"),
        ({"sr_ste_weight": -1.0}, "sr_ste_weight=-1.0: must be"),
        ({"recipe": "sdgf"}, "recipe='sdgf': not one of sr_ste, mdgf_linear"),
        ({"recipe": "sr_ste", "decay_rate": 0.1}, "decay_rate=0.1: recipe='sr_ste' does not read"),
        ({"recipe": "sr_ste", "pruned_grad": "blocked"}, "pruned_grad='blocked': recipe='sr_ste'"),
        ({"sr_ste_decoupled": True}, "sr_ste_decoupled=True: recipe='mdgf_exponential' does not"),
        ({"sr_ste_weight": 0.1}, "sr_ste_weight=0.1: recipe='mdgf_exponential' does not read"),
        ({"decay_steps": 15, "dense_steps": 5}, "decay_steps=15: with dense_steps=5 no step of"),
        (
            {"recipe": "sr_ste", "dense_steps": 20},
            "dense_steps=20: no step of train.num_steps=20 has",
        ),
    ],
)
def test_mistakes(options, message):
    config = presets.baseline("tiny")
    config.sparsity = registry.method_config("sparsity", "pgf", decay_steps=10)
    config.sparsity.update(options)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert str(error.value).startswith(f"sparsity.{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_reset_beside_those_of_others(name):
    """An optimiser that holds those of some weights only keeps the form of its state."""
    settings = presets.baseline("tiny").optimizer
    settings.name = name
    variables = {
        "up/kernel": nnx.Param(jnp.ones((4, 6)), axes=("embed", "mlp"), in_dims=1),
        "norm/scale": nnx.Param(jnp.ones(4), axes=(None,)),
    }
    params = {name: x[...] for name, x in variables.items()}
    state = make_optimizer(settings, 10, variables).init(params)
    state = jax.tree.map(jnp.ones_like, state)
    changed = jnp.asarray(np.random.default_rng(0).random((4, 6)) < 0.5)
    known = (*params, "frozen/kernel")
    new = _reset(state, known, {"up/kernel": changed, "frozen/kernel": changed})
    assert jax.tree.structure(new) == jax.tree.structure(state)
    moments = [x for x in jax.tree.leaves(new) if x.shape == changed.shape]
    assert len(moments) == {"adamw": 2, "muon": 1}[name]
    for moment in moments:
        np.testing.assert_array_equal(moment, ~changed)
    assert sum(jnp.sum(x == 0) for x in jax.tree.leaves(new)) == len(moments) * changed.sum()
