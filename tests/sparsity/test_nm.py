"""Masks of n of every m: any group, traced n, ties, axes that devices divide, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.sparsity import nm
from sparseformer_jax.sparsity.nm import Pattern


def by_sorting(scores, n, m, axis):
    """What a stable sort of each group drops first."""
    moved = np.moveaxis(scores, axis, -1)
    grouped = moved.reshape(*moved.shape[:-1], -1, m)
    kept = np.zeros(grouped.shape, bool)
    order = np.argsort(grouped, axis=-1, kind="stable")[..., m - n :]
    np.put_along_axis(kept, order, True, axis=-1)
    return np.moveaxis(kept.reshape(moved.shape), -1, axis)


# Groups up to 16 are compared, larger ones are sorted.
@pytest.mark.parametrize(("m", "axis"), [(4, -1), (6, -3), (16, -2), (24, -2)])
def test_masks_are_those_of_a_stable_sort(m, axis):
    """With ties in nearly every group, for n that is known when it runs."""
    shape = [3, 2, 5]
    shape[axis] = 2 * m
    scores = np.random.default_rng(m).integers(0, 4, shape).astype(np.float32)
    mask = jax.jit(nm.mask, static_argnums=(2, 3))
    for n in {1, 2, m // 2, m - 1, m}:
        kept = np.asarray(mask(scores, jnp.asarray(n), m, axis))
        np.testing.assert_array_equal(kept, by_sorting(scores, n, m, axis))
        assert nm.holds(kept, Pattern(n, m), axis)
        assert not nm.holds(~kept, Pattern(n, m), axis) or 2 * n == m


def test_groups_of_a_divided_axis_stay_on_their_device():
    scores = np.random.default_rng(0).random((2, 16, 6), np.float32)
    with jax.set_mesh(mesh.make_mesh({"tensor": 4}, jax.devices()[:4])):
        placed = jax.device_put(scores, jax.P(None, "tensor", None))
        kept = jax.jit(lambda x: nm.mask(x, 2, 4, -2))(placed)
        assert kept.sharding.spec == placed.sharding.spec
    np.testing.assert_array_equal(kept, by_sorting(scores, 2, 4, -2))


@pytest.mark.parametrize(
    "text", ["2", "2/4", "2:", "a:4", "-1:4", "2:4:8", "2.0:4", "1" * 9 + ":4"]
)
def test_what_is_no_pattern(text):
    with pytest.raises(
        ConfigError, match=r"^pattern '.*': must be n:m, n kept of every m, as 2:4$"
    ):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["0:4", "5:4", "1:0"])
def test_a_pattern_keeps_from_one_to_all(text):
    with pytest.raises(ConfigError, match=f"^pattern {text}: .* must be from 1 to m$"):
        Pattern.parse(text)


def test_patterns():
    assert Pattern.parse(" 2:4 ") == Pattern(2, 4)
    assert str(Pattern(1, 16)) == "1:16"
    assert Pattern(3, 4).density == 0.75


def test_groups_must_divide_the_axis():
    with pytest.raises(ConfigError, match="an axis of 10 entries does not divide into groups of 4"):
        nm.mask(jnp.zeros((10, 4)), 2, 4, -2)
    assert not nm.holds(np.ones((10, 4), bool), Pattern(4, 4), -2)


@pytest.mark.parametrize(("n", "m", "count"), [(1, 4, 4), (2, 4, 6), (3, 6, 20), (4, 8, 70)])
def test_candidates_are_all_masks_once(n, m, count):
    table = nm.candidates(n, m)
    assert len(table) == len(np.unique(table, axis=0)) == count
    assert (table.sum(axis=1) == n).all()


def test_too_many_candidates():
    with pytest.raises(
        ConfigError, match="^pattern 4:10: 210 masks of a group; must be at most 70"
    ):
        nm.candidates(4, 10)
