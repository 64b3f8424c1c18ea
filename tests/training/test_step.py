"""One optimiser step: accumulation, clipping, frozen parameters, every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import registry
from sparseformer_jax.training.state import ModelDef
from sparseformer_jax.training.step import _clip
from tests.model.harness import PENALISED
from tests.training.steps import packed_batch, train

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"context": 2, "fsdp": 4},
}


@pytest.fixture
def batch():
    return packed_batch(258)


@pytest.fixture
def plain(config):
    config.model.dropout = 0.0
    config.train.accumulation_steps = 1
    config.optimizer.warmup_steps = 0
    return config


def assert_close(actual, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), actual, expected
    )


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.representative("adamw-tensor")
def test_losses_are_the_same_on_every_mesh(plain, batch, optimizer, sizes):
    plain.optimizer.name = optimizer
    expected, _, state = train(plain, {}, batch)
    assert expected[-1] < expected[0]
    losses, _, _ = train(plain, sizes, batch)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_accumulation_equals_one_big_batch(plain, batch, add_attention):
    """Auxiliary losses and the second state too, though pieces differ in targets."""
    add_attention("penalised", PENALISED)
    plain.attention = registry.method_config("attention", "penalised")
    plain.train.z_loss = 0.01
    plain.optimizer.eps = 1e-4  # or AdamW divides rounding by rounding
    expected, metrics, state = train(plain, {}, batch, num_steps=2)
    plain.train.accumulation_steps = 4
    losses, pieced_metrics, pieced_state = train(plain, {}, batch, num_steps=2)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert metrics["energy"] > 0
    del metrics["density"], pieced_metrics["density"]  # means over pieces, not over tokens
    assert_close(pieced_metrics, metrics)
    assert_close(pieced_state.opt_state, state.opt_state, rtol=1e-3)
    for name, value in state.params.items():
        moved = 2 * plain.optimizer.learning_rate
        np.testing.assert_allclose(pieced_state.params[name], value, atol=1e-3 * moved)


@pytest.fixture
def random(plain):
    """Much dropout and no learning: losses differ by what is dropped alone."""
    plain.model.dropout = 0.4
    plain.optimizer.learning_rate = 1e-12
    plain.optimizer.schedule = "constant"
    return plain


def test_every_step_drops_something_else(random, batch):
    losses, _, _ = train(random, {}, batch)
    assert np.ptp(losses) > 1e-3
    assert losses == train(random, {}, batch)[0]


def test_every_piece_drops_something_else(random, batch):
    """Two equal pieces, of which one has all the weight: the loss is that piece's."""
    random.train.accumulation_steps = 2
    rows = {name: np.concatenate([x[:8], x[:8]]) for name, x in batch.items()}
    losses = []
    for piece in range(2):
        chosen = (np.arange(16) // 8 == piece)[:, None]
        weighed = rows | {"weights": rows["weights"] * chosen}
        losses += train(random, {}, weighed, num_steps=1)[0]
    assert abs(losses[0] - losses[1]) > 1e-4  # rounding is 1e-6


def test_frozen_parameters_stay_and_take_no_optimiser_memory(plain, batch):
    plain.train.trainable = r"attention/(query|key)/"
    _, _, before = train(plain, {}, batch, num_steps=1)
    _, _, after = train(plain, {}, batch, num_steps=3)
    moved = {n for n in before.params if not np.array_equal(before.params[n], after.params[n])}
    assert moved == {n for n in before.params if "/query/" in n or "/key/" in n}
    names = {
        str(path[-1].key)
        for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state)
        if leaf.ndim
    }
    assert names == moved


def test_clipping_bounds_the_gradient(plain, batch):
    """After a step AdamW's first moment is 1 - b1 of the gradient that it was given."""
    plain.optimizer.clip_norm = 0.05
    _, metrics, state = train(plain, {}, batch, num_steps=1)
    assert metrics["grad_norm"] > 0.05
    given = np.concatenate([x.ravel() for x in state.opt_state[0].mu.values()])
    expected = (1 - plain.optimizer.b1) * 0.05
    np.testing.assert_allclose(np.linalg.norm(given), expected, rtol=1e-5)


@pytest.mark.parametrize(("limit", "factor"), [(2.5, 0.5), (5.5, 1), (0.0, 1)])
def test_a_gradient_is_scaled_where_it_exceeds_the_limit(limit, factor):
    grads = {"one": jnp.float32([3, 0]), "other": jnp.float32([[-4]])}
    clipped = _clip(grads, norm=jnp.float32(5), limit=limit)
    assert_close(clipped, jax.tree.map(lambda x: factor * x, grads), rtol=1e-6)


def test_norms_are_those_of_the_trainable_parameters(plain, batch):
    plain.train.trainable = r"/(query|mlp_norm)/"
    _, _, before = train(plain, {}, batch, num_steps=1)
    _, metrics, after = train(plain, {}, batch, num_steps=2)
    names = [name for name in after.params if "/query/" in name or "/mlp_norm/" in name]

    def norm(arrays):
        return np.linalg.norm(np.concatenate([np.float64(x).ravel() for x in arrays]))

    moves = [after.params[name] - before.params[name] for name in names]
    np.testing.assert_allclose(metrics["param_norm"], norm(after.params[n] for n in names), 1e-6)
    np.testing.assert_allclose(metrics["update_norm"], norm(moves), 1e-4)


def test_metrics_name_what_is_not_finite(plain, batch):
    plain.model.logits_soft_cap = None
    plain.train.z_loss = 1e38
    _, metrics, _ = train(plain, {}, batch, num_steps=1)
    assert not np.isfinite(metrics["grad_norm"])
    assert any(metrics["nonfinite"].values())


def test_a_pattern_that_selects_nothing_is_refused(plain):
    plain.train.trainable = "no_such_parameter"
    with pytest.raises(
        ValueError, match="train.trainable='no_such_parameter' matches no parameter"
    ):
        ModelDef(plain).trainable()
