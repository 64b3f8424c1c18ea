"""One-shot pruning against plain float64 loops, at sizes that divide badly."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.sparsity import _dsnot, _ria, _selection, _sparsegpt, one_shot
from sparseformer_jax.sparsity._selection import Unstructured
from sparseformer_jax.sparsity._statistics import Statistics
from sparseformer_jax.sparsity.nm import Pattern

refine = jax.jit(_dsnot.refine, static_argnames=("pattern", "max_cycles", "threshold"))
sparsegpt = jax.jit(
    _sparsegpt.sparsegpt, static_argnames=("pattern", "update_weights", "block_size")
)


def matrix(num_inputs, num_outputs, seed=0):
    """A weight [I, O] and inputs [samples, T, I] of unequal sizes, one of which is always zero."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(num_inputs, num_outputs)).astype(np.float32)
    x = rng.normal(size=(3, 7, num_inputs)) * np.exp(rng.normal(size=num_inputs))
    x = (x + rng.normal(size=num_inputs)).astype(np.float32)
    x[..., num_inputs // 2] = 0
    return weight, x


def least(scores, number):
    """The places of so many scores, the smallest; of equal ones the first."""
    return sorted(range(len(scores)), key=lambda place: (scores[place], place))[:number]


def naive_select(scores, pattern, compared):
    """The mask of scores of which all in a column of `compared` inputs, or in a group, compete."""
    kept = np.ones(scores.shape, bool)
    if isinstance(pattern, Pattern):
        for start in range(0, len(scores), pattern.m):
            for out in range(scores.shape[1]):
                group = scores[start : start + pattern.m, out]
                kept[start + np.array(least(group, pattern.m - pattern.n), int), out] = False
        return kept
    for start in range(0, len(scores), compared):
        block = scores[start : start + compared]
        places = least(block.ravel(), int(block.size * (1 - pattern.density) + 1e-9) + 1)
        kept[start : start + compared].reshape(-1)[places] = False
    return kept


def naive_sparsegpt(weight, x, pattern, block_size, *, update):
    """Optimal Brain Surgeon, one input after another leaving the inverse of H."""
    weight = weight.astype(np.float64)
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    hessian = 2 * flat.T @ flat / len(x)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[dead] = 0
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse, inverses = np.linalg.inv(hessian), []
    for _ in range(len(weight)):
        inverses.append(inverse)
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    scale = np.array([each[0, 0] for each in inverses])[:, None]
    group = pattern.m if isinstance(pattern, Pattern) else block_size
    kept = np.ones(weight.shape, bool)
    for place in range(len(weight)):
        if place % group == 0:
            own = slice(place, place + group)
            kept[own] = naive_select(np.square(weight[own]) / scale[own], pattern, group)
        if update:
            error = np.where(kept[place], 0, weight[place]) / scale[place]
            weight[place:] -= np.outer(inverses[place][:, 0], error)
            weight[place] *= kept[place]
    return weight, kept


@pytest.mark.parametrize(
    ("pattern", "shape", "block_size"),
    [
        (Pattern(2, 5), (15, 4), 8),
        (Pattern(1, 3), (21, 1), 8),
        (Unstructured(0.3), (19, 5), 8),
        (Unstructured(0.6), (6, 3), 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("update", [True, False])
def test_sparsegpt_is_optimal_brain_surgeon(pattern, shape, block_size, update):
    weight, x = matrix(*shape)
    statistics = Statistics.of(jnp.asarray(x), products=True)
    found, mask, _ = sparsegpt(
        jnp.asarray(weight),
        statistics.hessian,
        pattern,
        update_weights=update,
        block_size=block_size,
    )
    expected, expected_mask = naive_sparsegpt(weight, x, pattern, block_size, update=update)
    np.testing.assert_array_equal(mask, expected_mask)
    # Float32 through the inverse of a matrix whose condition damping holds to some hundreds.
    expected = expected if update else weight
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_sparsegpt_lowers_the_error_of_outputs():
    weight, x = matrix(24, 6)
    x = np.cumsum(x, axis=-1)  # inputs that tell of each other
    statistics = Statistics.of(jnp.asarray(x), products=True)
    errors = {}
    for update in (True, False):
        recipe = one_shot.Recipe("sparsegpt", Pattern(2, 4), update_weights=update)
        pruned = one_shot.prune(recipe, jnp.asarray(weight), statistics)
        sparse = np.where(pruned.mask, pruned.weight, 0)
        errors[update] = np.square(x @ (sparse - weight)).sum()
    assert errors[True] < 0.5 * errors[False]


def naive_dsnot(weight, x, kept, scores, pattern, max_cycles, threshold):
    weight, x, kept = weight.astype(np.float64), x.astype(np.float64), kept.copy()
    variance = x.var(axis=1).mean(axis=0)
    parts = weight * x.sum(axis=1).mean(axis=0)[:, None]
    gains = np.divide(parts, variance[:, None], out=np.zeros_like(parts), where=parts != 0)
    importance = np.abs(weight) * np.sqrt(np.square(x).sum(axis=1).mean(axis=0))[:, None]
    is_grouped = isinstance(pattern, Pattern)
    for out in range(weight.shape[1]):
        dropped = [i for i in range(len(weight)) if not kept[i, out]]
        droppable = [i for i in range(len(weight)) if kept[i, out]]
        error = first = sum(parts[i, out] for i in dropped)
        for _ in range(max_cycles):
            sign = 1 if error > 0 else -1
            growing = [i for i in dropped if sign * gains[i, out] > 0]
            if abs(error) <= threshold or not growing:
                break
            new = max(growing, key=lambda i: sign * gains[i, out])
            if is_grouped:
                falling = [i for i in droppable if i // pattern.m == new // pattern.m]
                ranks = scores[:, out]
            else:
                falling = [i for i in droppable if sign * parts[i, out] < 0]
                ranks = importance[:, out]
            if not falling:
                break
            old = min(falling, key=lambda i: ranks[i])
            after = error + parts[old, out] - parts[new, out]
            if is_grouped and np.sign(after) != np.sign(first):
                break
            dropped.remove(new)
            droppable.remove(old)
            kept[new, out], kept[old, out], error = True, False, after
    return kept


@pytest.mark.parametrize("pattern", [Pattern(2, 5), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_dsnot_exchanges_until_lists_are_empty(pattern, seed):
    weight, x = matrix(15, 6, seed)
    statistics = Statistics.of(jnp.asarray(x), products=False)
    scores = one_shot.scores("wanda", jnp.asarray(weight), statistics)
    mask = one_shot.select("wanda", scores, pattern)
    settings = {"max_cycles": 50, "threshold": 0.01}
    found = refine(jnp.asarray(weight), statistics, mask, scores, pattern, **settings)
    expected = naive_dsnot(
        weight, x, np.asarray(mask), np.asarray(scores), pattern, *settings.values()
    )
    np.testing.assert_array_equal(found, expected)
    assert (found != mask).any()
    np.testing.assert_array_equal(found.sum(axis=0), mask.sum(axis=0))
    if isinstance(pattern, Pattern):
        assert (found.reshape(-1, pattern.m, 6).sum(axis=1) == pattern.n).all()


def test_fractions():
    weight, x = matrix(13, 5)
    weight[3] = weight[4] = 0.25  # ties
    statistics = Statistics.of(jnp.asarray(x), products=False)
    half = Unstructured(0.4)

    def mask(method):
        return one_shot.prune(one_shot.Recipe(method, half), jnp.asarray(weight), statistics).mask

    np.testing.assert_array_equal(mask("magnitude"), naive_select(np.abs(weight), half, 13))
    sizes = np.abs(weight).astype(np.float64)
    norms = np.square(x.astype(np.float64)).sum(axis=(0, 1)) / 3
    shares = sizes / sizes.sum(axis=0) + sizes / sizes.sum(axis=1, keepdims=True)
    ranking = shares * norms[:, None] ** 0.25
    np.testing.assert_array_equal(mask("ria"), naive_select(ranking, half, 13))
    wanda = np.ones_like(weight, bool)
    for out in range(5):
        wanda[least(sizes[:, out] * np.sqrt(norms), int(13 * 0.6)), out] = False
    np.testing.assert_array_equal(mask("wanda"), wanda)


def test_statistics_of_batches_add_up():
    _, x = matrix(6, 1)
    whole = Statistics.of(jnp.asarray(x), products=True)
    parts = (Statistics.of(jnp.asarray(x[rows]), products=True) for rows in ([0], [1, 2]))
    added = functools.reduce(lambda one, other: one + other, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), added, whole)
    np.testing.assert_allclose(whole.variance, x.var(axis=1).mean(axis=0), rtol=1e-5)


def test_ria_deals_inputs_to_groups():
    scores = jnp.arange(6.0)[:, None] * jnp.ones((1, 2))
    np.testing.assert_array_equal(_ria.permutation(scores, 2), [0, 5, 1, 4, 2, 3])
    np.testing.assert_array_equal(_ria.permutation(scores, 3), [0, 3, 4, 1, 2, 5])
    np.testing.assert_array_equal(_ria.order(scores, Pattern(1, 2)), [0, 5, 1, 4, 2, 3])
    apart = jnp.array([9.0, 1, 8, 2, 7, 3])[:, None]  # as it is the best there is
    np.testing.assert_array_equal(_ria.order(apart, Pattern(1, 2)), range(6))
    _, x = matrix(6, 2)
    zeros = jnp.zeros((6, 2))
    assert not _ria.scores(zeros, Statistics.of(jnp.asarray(x), products=False)).any()


def test_patterns_as_they_are_written():
    assert _selection.parse("2:4") == Pattern(2, 4)
    assert _selection.parse("0.25") == Unstructured(0.25)
    assert Unstructured(0.9).num_dropped(10) == 1  # 1 - 0.9 is less than 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _selection.parse("half"), "pattern 'half': must be n:m, as 2:4, or the kept frac"),
        (lambda: _selection.parse("1.5"), "pattern 1.5: the kept fraction must be above 0 and bel"),
        (lambda: _selection.parse("nan"), "pattern nan: the kept fraction must be above 0 and bel"),
        (lambda: _selection.parse("5:4"), "pattern 5:4: keeps 5 of 4"),
        (lambda: one_shot.Recipe("wand", Pattern(2, 4)), "--method='wand'"),
        (
            lambda: one_shot.Recipe("ria", Pattern(2, 4), update_weights=True),
            "--update_weights: ria changes no weights; take --method=sparsegpt",
        ),
        (
            lambda: one_shot.Recipe("sparsegpt", Pattern(2, 4), update_weights=True, dsnot=True),
            "--dsnot: revives weights",
        ),
        (
            lambda: one_shot.Recipe("ria", Unstructured(0.5), permute=True),
            "--permute: deals inputs to groups by RIA's scores, not for ria with 0.5",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        make()


def test_groups_that_do_not_divide():
    weight, x = (jnp.asarray(array) for array in matrix(10, 2))
    statistics = Statistics.of(x, products=True)
    for method in one_shot.METHODS:
        with pytest.raises(ConfigError, match="10 entries does not divide into groups of 4"):
            one_shot.prune(one_shot.Recipe(method, Pattern(2, 4)), weight, statistics)
