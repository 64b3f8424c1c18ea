"""Tiles and bands in parts, as a CPU computes them, against all of them at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.attention import _bands, _tiles

RNG = np.random.default_rng(0)
SIZE, WIDTH = 4, 8


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def assert_same_with_gradients(function, arrays):
    """Holds a function with a cache of 64 scores to itself with one that holds all."""
    both = []
    for scores in (2**15, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_tiles, "_SCORES_IN_CACHE", scores)
            # Another function each time, or jit would remember the first.
            out, pull = jax.vjp(jax.jit(lambda *x: function(*x)), *arrays)
            both.append(
                (out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)))
            )
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):
        # Sums of at most a hundred terms of size 1, in another order.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.representative("True")
@pytest.mark.parametrize("is_shared", [True, False])
def test_tiles_in_groups(is_shared):
    tiles = 2, 3
    visible = jnp.asarray(RNG.random(((1,) if is_shared else tiles) + (SIZE, 12)) < 0.6)
    itself = jnp.eye(SIZE, 12, dtype=bool)

    def attend(query, key, value, relative):
        scores = {"scale": 0.5, "cap": 3.0, "relative": relative, "first_place": -8}
        return _tiles.attend(
            query, key, value, visible[0] if is_shared else visible, last_resort=itself, **scores
        )

    relative = _tiles.Relative(normal(5, WIDTH), normal(5, WIDTH))
    arrays = [normal(*tiles, n, WIDTH) for n in (SIZE, 12, 12)]
    assert_same_with_gradients(attend, [*arrays, relative])


@pytest.mark.representative("True")
@pytest.mark.parametrize("has_ids", [True, False])
def test_bands_in_parts(has_ids):
    back, blocks, rows = 2, 6, 4
    slots = (back + blocks) * SIZE
    plan = _bands.Plan(SIZE, back, 7, True, _tiles.Plan(0.5, None, -back * SIZE))
    group = (
        jnp.asarray(np.sort(RNG.integers(0, 3, (rows, back + blocks)), axis=1)).at[:, :back].set(-1)
    )
    ids = jnp.asarray(RNG.integers(0, 2, (rows, slots))) if has_ids else None

    def attend(x, value, relative):
        return _bands.attend(plan, _bands.Rows(x, value, group, ids), relative)

    relative = _tiles.Relative(normal(5, WIDTH), normal(5, WIDTH))
    arrays = [normal(rows, slots, WIDTH), normal(rows, slots, WIDTH), relative]
    assert_same_with_gradients(attend, arrays)
    # All of them at once, as on other platforms, by automatic differentiation.
    whole = functools.partial(_bands._together, plan)
    out = whole(_bands.Rows(*arrays[:2], group, ids), relative)
    np.testing.assert_allclose(attend(*arrays), out, rtol=1e-5, atol=1e-5)


def test_parts_are_as_large_as_the_cache():
    plan = _bands.Plan(SIZE, 1, 5, False, _tiles.Plan(1.0, None, -SIZE))  # 32 scores a block
    rows = _bands.Rows(None, None, jnp.zeros((6, 1 + 10), int))
    for scores, expected in (
        (32, (1, 1, 60)),
        (100, (3, 1, 20)),
        (400, (6, 2, 5)),
        (9999, (6, 10, 1)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_tiles, "_SCORES_IN_CACHE", scores)
            parts = _bands._Parts.of(plan, rows)
        assert (parts.rows, parts.blocks, parts.count) == expected
