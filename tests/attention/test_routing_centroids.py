"""Centroids of routing against moving averages in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax.attention import _clusters, routing
from tests.attention.comparison import make_attention
from tests.model.harness import assert_close, normal


def numpy_update(update, decay, state, counts, sums):
    """The paper's and the released moving averages, written out."""
    centroids, old_counts, old_sums = state
    clusters = counts.shape[-1]
    if update == "paper":
        return decay * centroids + (1 - decay) * sums, None, None
    if update == "mean" and not old_counts.any():
        old_counts = np.broadcast_to(counts.sum(-1, keepdims=True) / clusters, counts.shape)
        old_sums = old_counts[..., None] * centroids
    counts = decay * old_counts + (1 - decay) * counts
    sums = decay * old_sums + (1 - decay) * sums
    total = counts.sum(-1, keepdims=True)
    smoothed = (counts + 1e-5) / (total + clusters * 1e-5) * total
    return sums / smoothed[..., None], counts, sums


@pytest.mark.parametrize("update", ["mean", "released", "paper"])
def test_centroids_follow_their_members(update):
    options = routing.Options(centroid_update=update, decay=0.9, num_clusters=3)
    rng = np.random.default_rng(0)
    centroids = normal(0, 2, 3, 6)
    state = centroids, np.zeros((2, 3)), centroids if update == "released" else 0 * centroids
    names = ("centroids", "counts", "sums")[: 1 if update == "paper" else 3]
    variables = {name: jnp.asarray(x) for name, x in zip(names, state, strict=False)}
    for step in range(3):
        nearest, x = rng.integers(0, 3, (4, 2, 10)), normal(step, 4, 10, 2, 6)
        weights = rng.integers(0, 2, (4, 10)).astype(np.float32)
        counts, sums = _clusters.members(
            jnp.asarray(x), jnp.asarray(nearest), jnp.asarray(weights), 3
        )
        is_member = (nearest[..., None] == np.arange(3)) * weights[:, None, :, None]
        np.testing.assert_array_equal(counts, is_member.sum((0, 2)))
        assert_close(sums, np.einsum("brtc,btrh->rch", is_member, x), 1e-6)
        state = numpy_update(update, 0.9, state, np.asarray(counts), np.asarray(sums))
        statistics = {"counts": counts[:, None], "sums": sums[:, None]}
        variables |= routing.Method.update(options, variables, statistics)
        found = {name: variables[name] for name in names}
        assert_close(found, dict(zip(names, state, strict=False)), 1e-5)


def test_queries_and_keys_of_their_own_move_centroids_one_after_the_other():
    rng = np.random.default_rng(0)
    centroids = jnp.asarray(normal(0, 1, 3, 6))
    variables = {"centroids": centroids, "counts": jnp.zeros((1, 3)), "sums": 0 * centroids}
    counts = jnp.asarray(rng.integers(1, 9, (1, 2, 3)).astype(np.float32))
    sums = jnp.asarray(normal(1, 1, 2, 3, 6))
    both = {"counts": counts, "sums": sums}
    first, then = ({name: x[:, k : k + 1] for name, x in both.items()} for k in range(2))
    mean, paper = (routing.Options(centroid_update=update) for update in ("mean", "paper"))
    one = routing.Method.update(mean, variables, first)
    assert_close(
        routing.Method.update(mean, variables, both), routing.Method.update(mean, one, then), 1e-6
    )
    moved = routing.Method.update(paper, {"centroids": centroids}, both)["centroids"]
    assert_close(moved, 0.999 * centroids + 0.001 * (sums[:, 0] + sums[:, 1]) / 2, 1e-6)


@pytest.mark.parametrize("update", ["mean", "released", "frozen"])
def test_cold_start(update):
    """One step moves a mean by 1 - decay; the released form throws centroids far out."""
    options = routing.Options(centroid_update=update, decay=0.99, num_clusters=4, window_size=8)
    attention = make_attention("routing", dataclasses.asdict(options), num_kv_heads=4)
    fresh = routing.Method(attention.config, options, rngs=nnx.Rngs(0))
    names = ("centroids", "counts", "sums")
    variables = {n: getattr(fresh, n)[...] for n in names if hasattr(fresh, n)}
    before = variables["centroids"]
    assert_close(jnp.linalg.norm(before, axis=-1), jnp.full((2, 4), 6**0.5), 1e-5)
    x = _clusters.normalise(jnp.asarray(normal(0, 8, 50, 2, 6)))
    nearest = jnp.argmax(_clusters.scores(x, before), axis=2)
    counts, sums = _clusters.members(x, nearest, jnp.ones((8, 50)), 4)
    assert counts.min() > 0
    statistics = {"counts": counts[:, None], "sums": sums[:, None]}
    after = variables | routing.Method.update(options, variables, statistics)
    distance = jnp.linalg.norm(after["centroids"] - before, axis=-1)
    none = routing.Method.update(options, variables, jax.tree.map(jnp.zeros_like, statistics))
    if update == "mean":
        assert distance.min() > 0
        assert distance.max() < 0.05 * 6**0.5
    if update == "released":
        assert jnp.linalg.norm(after["centroids"], axis=-1).max() > 1.2 * 6**0.5
    if update == "frozen":
        assert distance.max() == 0
    if update != "released":
        np.testing.assert_allclose((variables | none)["centroids"], before, rtol=1e-6)
