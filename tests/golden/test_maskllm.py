"""Learned masks against the authors' code, with the noise that it drew.

Their weights are [out, in] with logits [groups in rows, candidates]; ours are [in, out] and
[candidates, in / m, out]. Everything comes from the files: other shapes and settings of the same
form pass unchanged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseformer_jax import presets
from sparseformer_jax.sparsity import maskllm, nm, packing
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.step import _clip, _norm
from tests.golden import loading
from tests.model.harness import assert_close

MANIFEST = loading.settings("maskllm", "manifest.json")
EPS = float(np.finfo(np.float32).eps)


def cases(file):
    found = {case["id"]: case for case in MANIFEST[file]}
    return pytest.mark.parametrize("case", found.values(), ids=list(found))


@functools.cache
def file_arrays(file):
    return loading.arrays("maskllm", file)


def load(file, case):
    """The arrays of a case by what they are; weights, masks and logits as ours are."""
    start, found = f"{case['id']}_", {}
    for name, x in file_arrays(file).items():
        what = name.removeprefix(start)
        if what == name:
            continue
        if "logits" in what or "gumbel" in what:
            rows, columns = case["weight_shape"]
            x = x.reshape(rows, columns // case["M"], -1).transpose(2, 1, 0)
        elif "mask" in what or what.endswith("weight"):
            x = x.T
        found[what] = jnp.asarray(x) if x.dtype == np.float32 else x
    return found


def target_of(case):
    return Target(Pattern(case["N"], case["M"]), -2, 2)


def rounding(logits, noise, options, step):
    """Of a soft mask, which moves at most a quarter of what the softmax's argument does.

    Tau is a difference of larger numbers.
    """
    kappa, tau = map(float, maskllm.schedule(options, step))
    argument = float(np.abs(kappa * logits + noise).max()) / tau
    return EPS * (4 + argument / 2 + max(options.tau) / tau)


@pytest.mark.parametrize("array", [case["array"] for case in MANIFEST["candidates.npz"]])
def test_candidates(array):
    n, m = map(int, array.split("_")[1:])
    np.testing.assert_array_equal(nm.candidates(n, m), file_arrays("candidates.npz")[array])


@cases("prior_init.npz")
def test_prior(case):
    arrays, target = load("prior_init.npz", case), target_of(case)
    overlap = maskllm.overlaps(jnp.asarray(arrays["prior_mask"] > 0), target)
    logits = maskllm.add_prior(arrays["logits_before"], overlap, case["alpha"])
    # A standard deviation of so many numbers.
    assert_close(logits, arrays["logits_after"], EPS * logits.size**0.5)


@cases("soft_mask.npz")
def test_soft_masks(case):
    """Masks, losses and gradients of a step through the method itself."""
    arrays, target, step = load("soft_mask.npz", case), target_of(case), case["iteration"]
    options = maskllm.Options(
        kappa=tuple(case["kappa_range"]),
        tau=tuple(case["tau_range"]),
        schedule_steps=case["train_iters"],
        regularizer=case["reg_lambda"],
        straight_through=case["hard"],
    )
    method, noise = maskllm.Method(options), arrays["gumbel"]

    def loss(logits, weight):
        applied = method.sampled(weight, logits, noise, target, step)
        mask = method.sampled(jnp.ones_like(weight), logits, noise, target, step).weight
        y = arrays["x"] @ applied.weight
        found = {"y": y, "mask": mask, "reg": jnp.sum(jnp.square(applied.weight))}
        total = jnp.vdot(y, arrays["cot_y"]) + sum(applied.losses.values())
        return total, found | {"loss": total}

    grad = jax.jit(jax.grad(loss, has_aux=True))
    gradient, found = grad(arrays["logits"], arrays["weight"])
    kappa, tau = maskllm.schedule(options, step)
    assert float(kappa) == pytest.approx(case["kappa"], rel=4 * EPS)
    assert float(tau) == pytest.approx(case["tau"], abs=2 * EPS * max(case["tau_range"]))
    of_mask = rounding(arrays["logits"], noise, options, step)
    for name, x in found.items():
        # Sums of as many products lose a digit to what cancels.
        assert_close(x, arrays[name], of_mask if name == "mask" else 4 * of_mask)
    assert_close(gradient, arrays["grad_logits"], 8 * of_mask)
    if case["reg_lambda"]:
        fade = 1 - step / case["train_iters"]
        assert case["reg_coef"] == pytest.approx(case["reg_lambda"] * fade)


@cases("general_nm.npz")
def test_weights_that_train_too(case):
    arrays, target = load("general_nm.npz", case), target_of(case)
    options = maskllm.Options(
        kappa=(case["kappa"],) * 2,
        tau=(case["tau"],) * 2,
        regularizer=0.0,
        straight_through=case["hard"],
    )
    method, noise = maskllm.Method(options), arrays["gumbel"]

    def loss(logits, weight):
        applied = method.sampled(weight, logits, noise, target, 3)
        y = arrays["x"] @ applied.weight + arrays["bias"]
        return jnp.vdot(y, arrays["cot_y"]), {"y": y, "reg": jnp.sum(jnp.square(applied.weight))}

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (of_logits, of_weight), found = grad(arrays["logits"], arrays["weight"])
    tolerance = rounding(arrays["logits"], noise, options, 3)
    found |= {"grad_logits": of_logits, "grad_weight": of_weight}
    for name, x in found.items():
        assert_close(x, arrays[name], 8 * tolerance)

    kept = final_mask(arrays["logits"], target)
    np.testing.assert_array_equal(kept, arrays["mask_eval"])
    y = arrays["x"] @ (arrays["weight"] * kept) + arrays["bias"]
    assert_close(y, arrays["y_eval"], 4 * EPS)


@functools.partial(jax.jit, static_argnums=1)
def final_mask(logits, target):
    method = maskllm.Method(maskllm.Options())
    return method.kept(None, {"mask_logits": logits}, target)


@cases("final_mask.npz")
def test_final_masks(case):
    """Packed as theirs are, whose rows sum over columns."""
    arrays = load("final_mask.npz", case)
    kept = np.asarray(final_mask(arrays["logits"], target_of(case)))
    np.testing.assert_array_equal(kept, arrays["mask"])
    packed = packing.pack_bits(kept.T)
    np.testing.assert_array_equal(packed, arrays["packed"])
    np.testing.assert_array_equal(packing.unpack_bits(packed, kept.T.shape), kept.T)


def optimizer_of(case, options):
    """The optimiser of logits, as training makes it."""
    settings = presets.baseline("tiny").optimizer
    settings.update(
        learning_rate=case["lr"],
        schedule="constant",
        warmup_steps=0,
        b1=case["adam_betas"][0],
        b2=case["adam_betas"][1],
        eps=case["adam_eps"],
    )
    group = maskllm.Method(options).optimizer_group("mask_logits")
    logits = maskllm.MaskLogits(jnp.zeros(()), axes=(), **group)
    return make_optimizer(settings, case["steps"], {"mask_logits": logits})


@cases("trajectory.npz")
def test_trajectory(case):
    """All steps from the first logits: prior, losses, clipping and optimiser."""
    arrays, target = load("trajectory.npz", case), target_of(case)
    options = maskllm.Options(
        prior_weight=case["alpha"],
        kappa=tuple(case["kappa_range"]),
        tau=tuple(case["tau_range"]),
        schedule_steps=case["steps"],
        regularizer=case["reg_lambda"],
        weight_decay=case["weight_decay"],
    )
    method, optimizer = maskllm.Method(options), optimizer_of(case, options)
    weight = arrays["weight"]

    def loss(params, noise, step):
        logits = params["mask_logits"]
        applied = method.sampled(weight, logits, noise, target, step)
        mask = method.sampled(jnp.ones_like(weight), logits, noise, target, step).weight
        main = jnp.mean(jnp.square(arrays["x"] @ applied.weight - arrays["x"] @ weight))
        found = {"main_loss": main, "reg": jnp.sum(jnp.square(applied.weight))}
        return main + sum(applied.losses.values()), (mask, found)

    @jax.jit
    def train(params, opt_state, noise, step):
        grads, (mask, found) = jax.grad(loss, has_aux=True)(params, noise, step)
        norm = _norm({"mask_logits": jnp.sum(jnp.square(grads["mask_logits"]))})
        grads = _clip(grads, norm, case["clip_norm"])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, mask, found | {"grad_norm": norm}

    overlap = maskllm.overlaps(jnp.asarray(arrays["prior_mask"] > 0), target)
    logits = maskllm.add_prior(arrays["logits_init"], overlap, options.prior_weight)
    assert_close(logits, arrays["logits_0"], EPS * logits.size**0.5)
    params, tolerance = {"mask_logits": logits}, 0.0
    opt_state = optimizer.init(params)
    for step in range(case["steps"]):
        noise = arrays[f"gumbel_{step}"]
        # A step goes on from the errors of those before.
        tolerance += 4 * rounding(arrays[f"logits_{step}"], noise, options, step)
        params, opt_state, mask, found = train(params, opt_state, noise, step)
        assert_close(mask, arrays[f"mask_{step}"], tolerance)
        for name, x in found.items():
            assert_close(x, arrays[name][step], tolerance)
        assert_close(params["mask_logits"], arrays[f"logits_{step + 1}"], tolerance)
    kept = final_mask(params["mask_logits"], target)
    np.testing.assert_array_equal(kept, arrays["final_mask"])
