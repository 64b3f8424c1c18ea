"""n:m masks, their schedules and gradients, and 2:4 packing, against two published implementations.

Their matrices are [out, in] and ours [in, out], so all are transposed. Everything comes from the
files: other shapes and settings of the same form pass unchanged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.sparsity import _selection, nm, packing, pgf
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.sparsity.nm import Pattern
from tests.golden import loading
from tests.model.harness import assert_close

MANIFEST = loading.settings("nm", "manifest.json")
EPS = float(np.finfo(np.float32).eps)
LONG = 10**6  # steps of a phase that does not end

RECIPES = {
    "linear": "mdgf_linear",
    "exp": "mdgf_exponential",
    "sparsify": "sdgf_stepwise",
    "fine": "sdgf_geometric",
}


def cases(file, *prefixes):
    """The cases of a file, or those of them whose names start so."""
    found = {case["id"]: case for case in MANIFEST[file]}
    found = {name: case for name, case in found.items() if name.startswith(prefixes or "")}
    return pytest.mark.parametrize("case", found.values(), ids=list(found))


@functools.cache
def file_arrays(file):
    return loading.arrays("nm", file)


def load(file, case):
    """The arrays of a case by what they are; matrices as ours are."""
    start = f"{case['id']}_"
    found = file_arrays(file).items()
    arrays = {name.removeprefix(start): x for name, x in found if name.startswith(start)}
    return {name: x.T if x.ndim == 2 else x for name, x in arrays.items()}


def target_of(case, axis=None):
    axis = -1 - case["group_axis"] if axis is None else axis
    return Target(Pattern(case["N"], case["M"]), axis, 2)


@functools.partial(jax.jit, static_argnums=(2, 3))
def mask_of(weight, n, m, axis):
    return nm.mask(jnp.abs(weight), n, m, axis)


def case_mask(arrays, case):
    target = target_of(case)
    return mask_of(arrays["w"], case["N"], case["M"], target.axis)


@functools.partial(jax.jit, static_argnums=3)
def seen(weight, kept, factor, pruned_grad, cotangent):
    """What products see of a weight, and the gradient that reaches it."""
    out, pull = jax.vjp(lambda w: pgf.effective(w, kept, factor, pruned_grad), weight)
    return out, pull(cotangent)[0]


@cases("nm_masks.npz", "case", "tie")
def test_masks(case):
    arrays = load("nm_masks.npz", case)
    np.testing.assert_array_equal(case_mask(arrays, case), arrays["mask"])


@cases("nm_masks.npz", "conv")
def test_masks_along_an_axis_in_the_middle(case):
    arrays = load("nm_masks.npz", case)
    kept = mask_of(arrays["w"], case["N"], case["M"], 1 - arrays["w"].ndim)
    np.testing.assert_array_equal(kept, arrays["mask"])


@cases("nm_masks.npz", "uns")
def test_masks_of_a_whole_tensor(case):
    arrays = load("nm_masks.npz", case)
    kept = _selection.of_all(jnp.abs(arrays["w"]), arrays["w"].size - case["kept"])
    np.testing.assert_array_equal(kept, arrays["mask"])


@cases("mdgf.npz")
def test_mask_decay(case):
    arrays = load("mdgf.npz", case)
    np.testing.assert_array_equal(case_mask(arrays, case), arrays["mask"])
    options = pgf.Options(
        recipe=RECIPES[case["kind"]], decay_rate=case["coef"], decay_steps=LONG,
        pruned_grad="straight_through",
    )  # fmt: skip
    for step, beta in zip(case["steps"], arrays["beta"], strict=True):
        factor = pgf.pruned_factor(options, jnp.asarray(step))
        # The rounded rate times steps, in a difference from 1 or an exponent.
        rounding = 2 * EPS * (1 + min(case["coef"] * step, 1.0))
        if case["kind"] == "exp":
            rounding = 2 * EPS * (1 + case["coef"] * step) * beta
        assert float(factor) == pytest.approx(beta, rel=0, abs=rounding)
        out, gradient = seen(
            arrays["w"], arrays["mask"] > 0, factor, "straight_through", arrays["cot"]
        )
        np.testing.assert_array_equal(gradient, arrays["grad_straight_through"])
        error = np.abs(out - arrays[f"out_s{step}"])
        assert (error <= np.abs(arrays["w"]) * (rounding + 2 * EPS * beta)).all()


@pytest.mark.parametrize("pruned_grad", ["scaled", "blocked"])
@cases("decay_true_gradient.npz")
def test_true_gradients(case, pruned_grad):
    """Mask decay by a factor for each update, and structure decay by the released counts."""
    arrays, axis = load("decay_true_gradient.npz", case), -1 - case["group_axis"]
    decays = "decay_per_update" in case
    updates = case["updates"] if decays else range(len(case["N_by_update"]))
    for k in updates:
        n = case["N"] if decays else case["N_by_update"][k]
        factor = max(1 - k * case["decay_per_update"], 0) * (k < 16) if decays else 0.0
        kept = mask_of(arrays["w"], n, case["M"], axis)
        out, gradient = seen(arrays["w"], kept, factor, pruned_grad, arrays["cot"])
        wanted = arrays[f"grad_k{k}"]
        if pruned_grad == "blocked":
            wanted = np.where(kept, wanted, 0)
        # A factor of 1 - k c and a product.
        tolerance = {"rtol": 2 * EPS, "atol": 2 * EPS * np.abs(arrays["w"]).max()}
        np.testing.assert_allclose(out, arrays[f"out_k{k}"], **tolerance)
        np.testing.assert_allclose(gradient, wanted, **tolerance)


@functools.partial(jax.jit, static_argnums=(0, 1))
def at_step(options, target, weight, step):
    """What products see in a step, with the mask of that step."""
    method = pgf.Method(options)
    kept = pgf.mask_at(options, weight, target, step)
    return method.apply(weight, {"mask": kept}, target, step, None).weight


@cases("phase_schedule.npz")
def test_phases(case):
    """Their epochs bound phases and a counter of their own decays; our steps do both."""
    arrays, config = load("phase_schedule.npz", case), case["config"]
    last_decay = config["total_epochs"] - config["fine_tune_epochs"]
    dense = [p["step"] for p in case["points"] if p["epoch"] < config["dense_epochs"]]
    hard = [p["step"] for p in case["points"] if p["epoch"] > last_decay]
    dense_steps = max([0, *dense]) + 1
    options = pgf.Options(
        recipe=RECIPES[config["decay_type"]],
        decay_rate=config["decay_coef"],
        dense_steps=dense_steps,
        decay_steps=min([LONG, *hard]),
    )
    pattern = Pattern(config.get("n_sparsity", 2), config.get("m_sparsity", 4))
    target = Target(pattern, -2, 2)
    for point in case["points"]:
        epoch, step = point["epoch"], point["step"]
        ours = step if epoch < config["dense_epochs"] else dense_steps + step
        out = at_step(options, target, arrays["w"], ours)
        assert (out == arrays["w"]).sum() == point["kept_exactly"]
        wanted = arrays[f"out_e{epoch}_s{step}"]
        rounding = 4 * EPS * (1 + config["decay_coef"] * max(step, 0))
        assert (np.abs(out - wanted) <= rounding * np.abs(arrays["w"])).all()


@cases("sdgf.npz")
def test_structure_decay(case):
    """A step to an epoch."""
    arrays, target = load("sdgf.npz", case), Pattern.parse(case["target"])
    decay_steps = case["total_epochs"] - case["dense_epochs"] - case["fine_tune_epochs"]
    options = pgf.Options(
        recipe=RECIPES[case["kind"]], dense_steps=case["dense_epochs"], decay_steps=decay_steps
    )
    stages = pgf.stages(options, target)
    last = case["dense_epochs"] + decay_steps
    for epoch, pattern in enumerate(case["pattern_per_epoch"]):
        found = [stage.pattern for stage in stages if stage.first_step <= epoch][-1]
        if epoch >= last:  # theirs stays at a power of two where that is not the target
            assert found == target
        else:
            assert ("dense" if found.density == 1 else str(found)) == pattern
    for epoch in map(int, case["switch_epochs"]):
        out = at_step(options, Target(target, -2, 2), arrays["w"], epoch)
        np.testing.assert_array_equal(out, arrays[f"out_e{epoch}"])


@cases("srste.npz")
def test_sr_ste(case):
    arrays, target = load("srste.npz", case), target_of(case)
    method = pgf.Method(pgf.Options(recipe="sr_ste", sr_ste_weight=case["lam"]))
    state = jax.jit(lambda w: method.init(w, target, None, None))(arrays["w"])
    np.testing.assert_array_equal(state["mask"], arrays["mask"])

    def loss(weight):
        applied = method.apply(weight, state, target, 7, None)
        return jnp.vdot(applied.weight, arrays["cot"]) + sum(applied.losses.values()), applied

    gradient, applied = jax.jit(jax.grad(loss, has_aux=True))(arrays["w"])
    np.testing.assert_array_equal(applied.weight, arrays["out"])
    assert_close(gradient, arrays["grad"], 2 * EPS)


def kept_of_packed(dense, has_fewer):
    """The two places of each group of four that are packed, also where one is invented."""
    kept = nm.groups_on_host(dense, 4, -1) != 0
    invented = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}
    for filled, chosen in invented.items():
        pattern = np.isin(np.arange(4), filled)
        at = (kept == pattern).all(axis=-1)
        assert has_fewer or not at.any()
        kept[at] = np.isin(np.arange(4), chosen)
    return kept.reshape(dense.shape)


@cases("pack24.npz")
def test_packing(case):
    """Theirs permutes the words of codes; ours stand in the order of the groups."""
    arrays = {name: x.T for name, x in load("pack24.npz", case).items()}  # rows sum over columns
    kept = kept_of_packed(arrays["dense"], case["groups_with_fewer_than_two"])
    compressed = packing.compress(arrays["dense"], kept)
    np.testing.assert_array_equal(compressed.values, arrays["values"])
    words = arrays["meta_reordered"]
    assert compressed.codes.nbytes == words.nbytes
    unsigned = np.dtype(f"<u{words.dtype.itemsize}")
    np.testing.assert_array_equal(
        np.sort(compressed.codes.view(unsigned).ravel()), np.sort(words.view(unsigned).ravel())
    )
    dense, places = packing.decompress(compressed)
    np.testing.assert_array_equal(dense, arrays["dense"])
    np.testing.assert_array_equal(places, kept)
