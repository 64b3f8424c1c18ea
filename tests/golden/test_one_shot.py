"""One-shot pruning against the authors' code: scores, updates, masks and their refinement.

`proxsparse.npz` beside them is the operator of a training method, none of these.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.sparsity import _dsnot, _ria, _selection, _sparsegpt, one_shot
from sparseformer_jax.sparsity._selection import Unstructured
from sparseformer_jax.sparsity._statistics import Statistics
from sparseformer_jax.sparsity.nm import Pattern
from tests.golden import loading

# Relative to the largest entry. Sums of some hundred products, in float32 twice; updates go
# through the inverse of a matrix whose condition damping holds to some hundreds.
SUMS, UPDATES = 1e-5, 1e-4

refine = jax.jit(
    _dsnot.refine,
    static_argnames=("pattern", "max_cycles", "threshold", "variance_power", "keeps_sign"),
)
sparsegpt = jax.jit(
    _sparsegpt.sparsegpt, static_argnames=("pattern", "update_weights", "block_size", "damping")
)


def cases(method, file):
    found = loading.settings(method, "manifest.json")[file]
    return pytest.mark.parametrize("case", found, ids=[case["id"] for case in found])


@functools.cache
def load(method, file):
    return loading.arrays(method, file)


def of_case(method, file, case):
    """The arrays of a case, matrices of weights as ours are: inputs first."""
    start = f"{case['id']}_"
    found = load(method, file).items()
    arrays = {name.removeprefix(start): x for name, x in found if name.startswith(start)}
    weights = [n for n in arrays if n in ("w", "score") or n.startswith("w_")]
    masks = [n for n in arrays if n.startswith("mask_")]
    arrays |= {name: jnp.asarray(arrays[name].T) for name in weights}
    return arrays | {name: jnp.asarray(arrays[name].T != 0) for name in masks}


def pattern_of(case):
    if case["m"]:
        return Pattern(case["m"] - case["n_pruned"], case["m"])
    return Unstructured(1 - case["sparsity"])


def check(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def check_mask(actual, expected):
    np.testing.assert_array_equal(actual, expected)


@cases("one_shot_more", "sparsegpt_wanda.npz")
def test_sparsegpt_and_wanda(case):
    arrays = of_case("one_shot_more", "sparsegpt_wanda.npz", case)
    weight, statistics = arrays["w"], Statistics.of(jnp.asarray(arrays["x"]), products=True)
    check(statistics.hessian, arrays["hessian"], SUMS)
    check(statistics.mean_square, arrays["scaler_row"], SUMS)
    updated, mask, _ = sparsegpt(
        weight,
        arrays["hessian"],
        pattern_of(case),
        update_weights=True,
        block_size=case["column_block"],
        damping=case["damping"],
    )
    check_mask(mask, arrays["mask_sparsegpt"])
    check(updated, arrays["w_sparsegpt"], UPDATES)
    by_output = one_shot.Recipe("wanda", Unstructured(1 - case["sparsity"]))
    check_mask(one_shot.prune(by_output, weight, statistics).mask, arrays["mask_wanda_rows"])


@cases("one_shot_more", "ria.npz")
def test_ria(case):
    arrays = of_case("one_shot_more", "ria.npz", case)
    statistics = Statistics.of(jnp.asarray(arrays["x"]), products=False)
    scores = _ria.scores(arrays["w"], statistics, case["activation_power"])
    check(scores, arrays["score"], SUMS)
    fraction, pattern = Unstructured(1 - case["sparsity"]), pattern_of(case)
    check_mask(one_shot.select("ria", scores, fraction), arrays["mask_whole"])
    num_dropped = fraction.num_dropped(len(scores))
    check_mask(_selection.by_output(scores, num_dropped), arrays["mask_rows"])
    check_mask(one_shot.select("ria", scores, pattern), arrays["mask_nm"])
    order = _ria.permutation(scores, case["m"])
    np.testing.assert_array_equal(order, arrays["permutation"])
    permuted = np.zeros(scores.shape, bool)
    permuted[np.asarray(order)] = one_shot.select("ria", scores[order], pattern)
    check_mask(permuted, arrays["mask_nm_permuted"])


@cases("dsnot", "masks.npz")
def test_dsnot(case):
    arrays = of_case("dsnot", "masks.npz", case)
    weight, statistics = arrays["w"], Statistics.of(jnp.asarray(arrays["x"]), products=False)
    check(statistics.mean_sum, arrays["sum_mean"], SUMS)
    check(statistics.mean_square, arrays["sq_mean"], SUMS)
    check(statistics.variance, arrays["var"], SUMS)
    pattern, scores = pattern_of(case), one_shot.scores(case["initial"], weight, statistics)
    # The released code compares the weights of an output, by magnitude too.
    check_mask(one_shot.select("wanda", scores, pattern), arrays["mask_initial"])
    refined = refine(
        weight,
        statistics,
        arrays["mask_initial"],
        scores,
        pattern,
        max_cycles=case["max_cycles"],
        threshold=case["threshold"],
        variance_power=case["var_power"],
        keeps_sign=bool(case["m"]) or not case["no_sign_check"],
    )
    check_mask(refined, arrays["mask_final"])
    parts = weight * statistics.mean_sum[:, None]
    check(jnp.sum(jnp.where(refined, 0, parts), axis=0), arrays["error_final"], SUMS)


@cases("maskllm", "oneshot_priors.npz")
def test_priors(case):
    arrays = of_case("maskllm", "oneshot_priors.npz", case)
    weight, statistics = arrays["w"], Statistics.of(jnp.asarray(arrays["x"]), products=True)
    check(statistics.mean_square, arrays["scaler_row"], SUMS)
    check(statistics.hessian, arrays["hessian"], SUMS)
    pattern = Pattern(case["kept_N"], case["M"])
    for method in ("magnitude", "wanda"):
        recipe = one_shot.Recipe(method, pattern)
        check_mask(one_shot.prune(recipe, weight, statistics).mask, arrays[f"mask_{method}"])
    for update, name in ((False, "noupdate"), (True, "update")):
        updated, mask, _ = sparsegpt(
            weight,
            statistics.hessian,
            pattern,
            update_weights=update,
            block_size=case["column_block"],
            damping=case["damping"],
        )
        check_mask(mask, arrays[f"mask_sparsegpt_{name}"])
    check(updated, arrays["w_sparsegpt_update"], UPDATES)
