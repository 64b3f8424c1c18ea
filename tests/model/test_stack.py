"""Layers are grouped into few units that scan, and scanning changes nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax.model.stack import LayerStack, Reports, group_layers, layer_keys
from tests.model.harness import assert_close, layers, normal


def expand(groups):
    return [kind for unit, repeats in groups for kind in unit * repeats]


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ("", []),
        ("a", [("a", 1)]),
        ("aabbb", [("a", 2), ("b", 3)]),
        ("ababa", [("ab", 2), ("a", 1)]),
        ("ab" * 12, [("ab", 12)]),
        ("aaab" * 6, [("aaab", 6)]),
        ("a" * 24, [("a", 24)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
    ],
)
def test_groups(kinds, groups):
    assert group_layers(kinds) == [(tuple(unit), repeats) for unit, repeats in groups]


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_any_layers(seed):
    rng = np.random.default_rng(seed)
    kinds = list(rng.integers(0, rng.integers(1, 4), rng.integers(1, 25)))
    groups = group_layers(kinds)
    assert expand(groups) == kinds
    start = 0
    for unit, repeats in groups:
        covered = len(unit) * repeats
        assert repeats > 1 or len(unit) == 1
        # No other unit at this place covers more.
        for period in range(1, len(kinds)):
            count = covered // period + 1
            tried = kinds[start : start + period] * count
            assert count == 1 or kinds[start : start + period * count] != tried
        start += covered


class Toy(nnx.Module):
    """A layer that changes x by its own numbers and reports what it saw."""

    def __init__(self, kind, rngs):
        self.kind = kind
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (5, 5)) / 3)

    def __call__(self, x, positions, segment_ids, rng, step=0, weights=None):
        noise = 0 if rng is None else jax.random.normal(rng, x.shape)
        x = jnp.sin(jnp.sin(x @ self.weight[...])) + positions + noise
        losses = {"size": jnp.sum(x)} if self.kind == "a" else {}
        return x, Reports(losses, {"mean": jnp.mean(x)}, {"sum": jnp.sum(x)})


def make_stack(kinds="ab", repeats=3, remat="none"):
    makers = [functools.partial(Toy, kind) for kind in kinds]
    return LayerStack(makers, layer_keys(jax.random.key(0), len(kinds) * repeats), remat)


X, POSITIONS = jnp.asarray(normal(0, 2, 7, 5)), jnp.asarray(0.5)


def toys(stack):
    return layers(nnx.Dict(stacks=nnx.List([stack])))


def test_a_stack_is_its_layers_one_after_another():
    stack = make_stack()
    x, reports = X, []
    for layer in toys(stack):
        x, report = layer(x, POSITIONS, None, None)
        reports.append(report)
    sizes = [report.losses["size"] for report in reports if report.losses]
    assert (len(reports), len(sizes)) == (6, 3)
    sums = jnp.stack([report.statistics["sum"] for report in reports])
    expected = Reports(
        {"size": sum(sizes)},
        {"mean": jnp.stack([report.diagnostics["mean"] for report in reports])},
        {"unit/0/sum": sums[0::2], "unit/1/sum": sums[1::2]},
    )
    assert_close(stack(X, POSITIONS, None, None), (x, expected), 1e-6)


def test_layers_start_differently():
    assert len({float(layer.weight[0, 0]) for layer in toys(make_stack())}) == 6


def test_every_layer_has_its_own_randomness():
    stack = make_stack()
    for layer in stack.unit:
        layer.weight[...] = jnp.zeros_like(layer.weight[...])

    def noise(seed):
        keys = layer_keys(jax.random.key(seed), 6)
        _, reports = stack(X, POSITIONS, None, keys)
        return set(reports.diagnostics["mean"].tolist())

    assert noise(0) == noise(0)
    assert len(noise(0) | noise(1)) == 12


def residual_bytes(remat):
    graphdef, state = nnx.split(make_stack(remat=remat))

    def run(state):
        return nnx.merge(graphdef, state)(X, POSITIONS, None, None)[0]

    _, backward = jax.vjp(run, state)
    return sum(x.nbytes for x in jax.tree.leaves(backward))


def test_recomputing_saves_memory():
    kept = {r: residual_bytes(r) for r in ("none", "dots_saveable", "full")}
    assert kept["full"] < kept["dots_saveable"] < kept["none"]
    assert residual_bytes("everything_saveable") == kept["none"]
