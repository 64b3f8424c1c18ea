"""SeerAttention learns its gates from dense attention, and attends to what they choose."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparseformer_jax import registry
from sparseformer_jax.attention import _block_choice, _gates, _query_chunks
from sparseformer_jax.attention.inputs import Noise, Shard
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.model.rotary import rotary
from tests.attention.comparison import assert_same_on_mesh, make_attention
from tests.attention.seer_cases import (
    GATES,
    SIZE,
    attend,
    choice,
    inputs_of,
    kinds,
    losses,
    make,
    states,
    token_mask,
)
from tests.model.harness import assert_close, normal, packed

DENSE_OPTIONS = [
    {"gates": "decode", "block_size": 16, "token_budget": 1024},
    {"gates": "prefill", "block_size": 16, "density": 1.0},
    {"gates": "prefill", "block_size": 16},
]
BFLOAT16_ERROR = 0.1  # choices between close scores fall differently


@pytest.mark.representative("double")
@kinds
def test_documents_of_whole_blocks_learn_as_if_alone(kind):
    attention = make(kind, loss_start=0.0)
    lengths = [2 * SIZE, 3 * SIZE]
    ids = np.repeat(np.arange(2), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    x = states(attention, 0, 1, sum(lengths))
    found = losses(attention, x, positions, ids)
    alone = [losses(attention, x[:, row]) for row in (ids[0] == n for n in range(2))]
    np.testing.assert_allclose(found, np.concatenate(alone, axis=1), atol=1e-5)
    assert found.max() > 0.01


@pytest.mark.representative("prefill", "group")
@kinds
def test_documents_do_not_move_what_others_learn_or_see(kind):
    attention = make(kind, loss_start=0.0, keeps_first=True, token_budget=2 * SIZE)
    ids, positions = packed(np.random.default_rng(0), 4, 45)
    x = states(attention, 0, *ids.shape)
    changed = jnp.where((ids == 1)[..., None], 5 * states(attention, 1, *ids.shape), x)
    for run in (losses, sparse_outputs):
        before, after = (run(attention, y, positions, ids) for y in (x, changed))
        np.testing.assert_array_equal(before[ids != 1], after[ids != 1])
        assert (before != after)[ids == 1].any()


def sparse_outputs(attention, *arrays):
    return np.asarray(attend(attention, inputs_of(attention, *arrays)).output)


@pytest.mark.representative("prefill")
@pytest.mark.parametrize("kind", ["prefill", "double"])
def test_later_blocks_do_not_move_what_is_chosen(kind):
    attention = make(kind, density=0.4)
    x = states(attention, 0, 3, 45)
    cut = np.array([1, 3, 5])[:, None] * SIZE
    future = np.arange(45) >= cut
    changed = jnp.where(future[..., None], 5 * states(attention, 1, 3, 45), x)
    before, after = (sparse_outputs(attention, y) for y in (x, changed))
    np.testing.assert_array_equal(before[~future], after[~future])


CHOICES = {
    "density": ("prefill", {"density": 0.4}),
    "rows": ("double", {"density": 0.3, "dense_rows": 2, "keeps_first": True}),
    "threshold": ("prefill", {"threshold": 0.2}),
    "budget": ("prefill", {"token_budget": 3 * SIZE, "keeps_first": True}),
    "queries": ("group", {"token_budget": 3 * SIZE}),
    "queries_first": ("decode", {"token_budget": 2 * SIZE, "keeps_first": True}),
    "queries_threshold": ("group", {"threshold": 0.3, "capacity": 3}),
}


@pytest.mark.representative("rows", "threshold", "queries")
@pytest.mark.parametrize("case", CHOICES)
def test_attends_to_the_tokens_of_chosen_blocks(case):
    kind, options = CHOICES[case]
    attention, length = make(kind, **options), 45
    inputs = inputs_of(attention, states(attention, 0, 2, length))
    attended = attend(attention, inputs)
    _, chosen, _ = choice(attention, inputs)
    mask = token_mask(kind, chosen, length)
    own = np.arange(length) // SIZE
    assert mask[:, :, np.arange(length), np.arange(length)].all()
    if options.get("keeps_first"):
        assert mask[..., 0].all()
    if options.get("dense_rows"):
        is_last = own >= own[-1] + 1 - options["dense_rows"]
        assert (mask | ~np.tri(length, dtype=bool))[:, :, is_last].all()
    query, key, value = (
        np.asarray(x, np.float64) for x in (inputs.query, inputs.key, inputs.value)
    )
    key, value = (np.repeat(x, 2, axis=2) for x in (key, value))
    logits = attention.config.scale * np.einsum("bthd,bshd->bhts", query, key)
    weights = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, value)
    np.testing.assert_allclose(attended.output, expected, atol=1e-5 * np.abs(expected).max())
    density = mask.mean((0, 1)).sum() / (length * (length + 1) / 2)
    assert density < 1
    assert attended.diagnostics["density"] == pytest.approx(density)
    if "threshold" in options:
        assert attention.density(length) >= density
    else:
        assert attention.density(length) == pytest.approx(density)


@pytest.mark.representative("group")
@kinds
def test_selectors_score_as_they_say(kind):
    length, budget = 45, 3
    is_prefill = kind in ("prefill", "double")
    runs = {
        name: make(kind, token_budget=budget * SIZE, selector=name)
        for name in ("gate", "oracle", "mean_pooled", "recent")
    }
    inputs = inputs_of(runs["gate"], states(runs["gate"], 0, 2, length))
    found = {name: choice(a, inputs) for name, a in runs.items()}
    scores = {name: np.asarray(scores) for name, (scores, _, _) in found.items()}
    choices = {name: np.asarray(chosen) for name, (_, chosen, _) in found.items()}
    query, key = (np.asarray(x, np.float64) for x in (inputs.query, inputs.key))
    blocks = [slice(i, i + SIZE) for i in range(0, length, SIZE)]
    means = np.stack([key[:, own].mean(1) for own in blocks], axis=1)
    if is_prefill:
        query = np.stack([query[:, own].mean(1) for own in blocks], axis=1)
        means = np.repeat(means, 2, axis=2)
    else:
        query = query.reshape(*query.shape[:2], 2, 2, -1).mean(3)
    products = np.einsum("bmnd,bjnd->bnmj", query, means) / math.sqrt(query.shape[-1])
    np.testing.assert_allclose(scores["mean_pooled"], products, atol=1e-5)
    own = np.arange(length) // SIZE if not is_prefill else np.arange(len(blocks))
    is_last = (np.arange(len(blocks)) <= own[:, None]) & (
        np.arange(len(blocks)) > own[:, None] - budget
    )
    np.testing.assert_array_equal(
        choices["recent"], np.broadcast_to(is_last, choices["gate"].shape)
    )
    # Nothing keeps more of the target than what is chosen by it, the own block apart.
    past = np.arange(len(blocks)) < own[:, None]
    target = np.where(past, np.exp(scores["oracle"]), 0)
    mass = {name: (target * x).sum(-1) for name, x in choices.items()}
    for name in ("gate", "mean_pooled", "recent"):
        assert (mass["oracle"] >= mass[name] - 1e-6).all()
        assert mass["oracle"].sum() > mass[name].sum() + 1


def test_overflow_is_counted_and_keeps_the_best():
    whole, cut = (make("prefill", threshold=0.01, capacity=n) for n in (None, 3))
    inputs = inputs_of(whole, states(whole, 0, 2, 64))
    (scores, chosen, none), (_, kept, overflow) = (choice(a, inputs) for a in (whole, cut))
    count = np.asarray(chosen).sum(-1)
    assert not none.any()
    np.testing.assert_array_equal(overflow, count > 3)
    np.testing.assert_array_equal(np.asarray(kept).sum(-1), np.minimum(count, 3))
    assert (np.asarray(chosen) | ~np.asarray(kept)).all()
    past = np.arange(8) < np.arange(8)[:, None]
    dropped, taken = chosen & ~kept, np.asarray(kept) & past
    best_dropped = np.where(dropped, scores, -np.inf).max(-1)
    assert (best_dropped <= np.where(taken, scores, np.inf).min(-1)).all()
    assert attend(cut, inputs).diagnostics["overflow"] == pytest.approx(overflow.mean())


@pytest.mark.representative("prefill-*")
@pytest.mark.parametrize(
    ("kind", "choice", "sizes"),
    [
        ("prefill", {"density": 0.4}, {"tensor": 2, "context": 2, "data": 2}),
        ("double", {"threshold": 0.2}, {"context": 4, "tensor": 2}),
        ("group", {"token_budget": 2 * SIZE}, {"context": 8}),
    ],
    ids=str,
)
def test_same_on_a_mesh(kind, choice, sizes):
    assert_same_on_mesh(make(kind, **choice), sizes, 32)


def test_a_device_needs_whole_blocks_of_queries():
    attention = make("prefill", density=0.4)
    with pytest.raises(ValueError, match=r"mesh\.context leaves 4 queries .* 8 tokens"):
        assert_same_on_mesh(attention, {"context": 8}, 32)


@pytest.mark.representative("double")
@kinds
def test_losses_are_means_over_rows_that_count(kind):
    """Half of the rows do; the released mean is that of rows, divided by their blocks."""
    x = states(make(kind), 0, 2, 6 * SIZE)
    whole = losses(make(kind, loss_start=0.0), x)
    half = losses(make(kind, loss_start=0.5), x)
    released = {"loss_reduction": "element_mean", "loss_weight": 10.0}
    elements = losses(make(kind, loss_start=0.5, **released), x)
    rows = whole[:, 3 * SIZE :]
    assert not half[:, : 3 * SIZE].any()
    np.testing.assert_allclose(half.mean(), rows.mean(), rtol=1e-5)
    np.testing.assert_allclose(elements, 10 * half / 6, rtol=1e-5)


@pytest.mark.representative("prefill")
@kinds
def test_training_attends_densely_and_moves_gates_alone(kind):
    attention = make(kind, token_budget=2 * SIZE)
    dense = make_attention("dense", {})
    for shared in ("query", "key", "value", "out"):
        setattr(dense, shared, getattr(attention, shared))
    arrays = states(attention, 0, 2, 40), jnp.tile(jnp.arange(40), (2, 1)), None
    run = jax.jit(lambda module: module(*arrays, rng=jax.random.key(0)))
    np.testing.assert_array_equal(run(attention).output, run(dense).output)

    @jax.jit
    def gradients(attention):
        return nnx.grad(lambda a: a(*arrays, rng=jax.random.key(0)).losses["gate"])(attention)

    for path, gradient in nnx.to_flat_state(gradients(attention)):
        assert np.any(gradient[...]) == (path[0] == "gate"), path


def with_outliers(key):
    """States [4, 96, 20]: in each block one sticks out, and another just as far to the other side.

    So averages of a block do not tell how far.
    """
    noise_key, far_key = jax.random.split(key)
    far = 8 * jax.random.uniform(far_key, (4, 12))
    x = jax.random.normal(noise_key, (4, 12, SIZE, 20)) / 2
    x = x.at[..., 0].add(2).at[:, :, 2, 1].add(far).at[:, :, 5, 1].add(-far)
    return x.reshape(4, 12 * SIZE, 20)


def trained_gate(attention, num_steps):
    graphdef, gate, rest = nnx.split(attention, lambda path, _: path[0] == "gate", ...)
    optimizer, key = optax.adam(0.02), jax.random.key(1)

    @jax.jit
    def step(gate, state, number):
        def loss(gate):
            module = nnx.merge(graphdef, gate, rest)
            x = with_outliers(jax.random.fold_in(key, number))
            return jnp.mean(attend(module, inputs_of(module, x, noise=Noise(key))).losses["gate"])

        updates, state = optimizer.update(jax.grad(loss)(gate), state)
        return optax.apply_updates(gate, updates), state

    state = optimizer.init(gate)
    for number in range(num_steps):
        gate, state = step(gate, state, number)
    return nnx.merge(graphdef, gate, rest)


@pytest.mark.representative("prefill")
@pytest.mark.parametrize("kind", ["prefill", "group"])
def test_gates_find_more_of_the_true_blocks_than_averages_do(kind):
    attention = make(kind, loss_start=0.0)
    for projection in (attention.query, attention.key):
        projection.kernel[...] *= 2  # so that attention is not even
    attention = trained_gate(attention, 100)
    x = with_outliers(jax.random.key(0))
    positions = jnp.tile(jnp.arange(x.shape[1]), (len(x), 1))
    told = jax.jit(lambda attention: attention.inspect(x, positions, None))(attention)
    inputs, past = inputs_of(attention, x), told["past"][:, None]
    everything = jnp.ones(inputs.key.shape[:2], bool)
    means = _gates.pool(inputs.key, SIZE, ("avg",), everything)
    if kind == "prefill":
        queries = _gates.pool(inputs.query, SIZE, ("avg",), everything)
    else:
        queries = inputs.query.reshape(4, 12 * SIZE, 2, 2, -1).mean(3)

    def recall(scores):
        found, true = (_block_choice.highest(x, past, 2) for x in (scores, told["target"]))
        return jnp.sum(found & true) / jnp.sum(true)

    assert recall(told["gate"]) > recall(_gates.scores(queries, means)) + 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.2, "threshold": 0.1}, "set one"),
        ({"density": 1.5}, r"density=1\.5 must be above 0"),
        ({"token_budget": 63}, "token_budget=63 must be at least 64"),
        ({"token_budget": 64, "keeps_first": True}, "at least 128"),
        ({"capacity": 4}, "capacity=4 bounds a threshold"),
        ({"gates": "decode", "density": 0.5}, "set threshold or token_budget"),
        ({"gates": "decode", "query_projection": "head"}, r"takes \('none', 'group', 'average'\)"),
        ({"query_pools": ("max", "avg")}, "set query_projection='head'"),
        ({"key_pools": ("mean",)}, r"key_pools=\('mean',\): take some of"),
        ({"loss_start": 1.0}, r"loss_start=1\.0 must be"),
        ({"joint": True}, "joint=True attends to what gates choose; set density"),
    ],
    ids=str,
)
def test_refuses_options(options, message):
    with pytest.raises(ConfigError, match=message):
        registry.method_config("attention", "seer", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_dim": 4}, "set query_projection, or gate_dim"),
        ({"gate_dim": 5, "query_projection": "head"}, "RoPE turns 5 of its entries"),
    ],
    ids=str,
)
def test_refuses_gates_that_the_heads_do_not_allow(options, message):
    with pytest.raises(ValueError, match=message):
        make("prefill", **options)


def test_queries_learn_in_chunks_what_they_learn_at_once(monkeypatch):
    attention = make("group", token_budget=2 * SIZE, loss_start=0.0)
    ids, positions = packed(np.random.default_rng(0), 2, 45)
    x = states(attention, 0, *ids.shape)

    def run(x):
        inputs = inputs_of(attention, x, positions, ids, noise=Noise(jax.random.key(0)))
        return attention.attend(inputs, Shard(num_heads=4))

    whole = jax.jit(run)(x)
    monkeypatch.setattr(_query_chunks, "_WIDTH", 16)
    chunks = jax.jit(lambda x: run(x))(x)
    np.testing.assert_allclose(chunks.losses["gate"], whole.losses["gate"], atol=1e-5)
    for name, value in whole.diagnostics.items():
        assert chunks.diagnostics[name] == pytest.approx(float(value), abs=1e-6), name


def test_queries_attend_in_chunks_as_they_do_at_once(monkeypatch):
    """The last chunk is cut short; gradients are those of all queries too."""
    attention = make("group", threshold=0.2, capacity=2)
    ids, positions = packed(np.random.default_rng(0), 2, 45)
    x = states(attention, 0, *ids.shape)

    def run(x):
        attended = attention.attend(inputs_of(attention, x, positions, ids), Shard(num_heads=4))
        return jnp.sum(attended.output**2), attended

    (_, whole), whole_gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(x)
    monkeypatch.setattr(_query_chunks, "_WIDTH", 16)
    (_, chunks), gradient = jax.jit(jax.value_and_grad(lambda x: run(x), has_aux=True))(x)
    assert whole.diagnostics["overflow"] > 0
    assert_close(chunks, whole, 1e-5)
    assert_close(gradient, whole_gradient, 1e-5)


@pytest.mark.representative("group")
@kinds
def test_reports_how_well_gates_would_choose(kind):
    """Where all is chosen, nothing is missed; else the best blocks of the target are the most."""
    for budget in (2 * SIZE, 64 * SIZE):
        attention = make(kind, token_budget=budget)
        inputs = inputs_of(attention, states(attention, 0, 2, 64), noise=Noise(jax.random.key(0)))
        found = {name: float(x) for name, x in attend(attention, inputs).diagnostics.items()}
        assert found["density"] == 1  # in training
        assert found["overflow"] == 0
        assert found["gate_density"] == pytest.approx(attention.density(64))
        assert found["kl"] > 0
        if budget > 64:
            assert found["mass"] == pytest.approx(1)
            assert found["recall"] == 1
        else:
            assert 0 < found["mass"] < 1
            assert 0 < found["recall"] < 1


def test_gates_turn_as_the_model_does():
    """With its scaling, and as large a part of their entries."""
    scaling = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 64}
    model = {"head_dim": 8, "partial_rotary_factor": 0.5, **scaling}
    attention = make_attention("seer", GATES["prefill"], **model)
    x = jnp.asarray(normal(0, 1, 5, 4, 8))
    positions = SIZE * jnp.arange(5)[None]
    expected = rotary(x, positions, attention.config)
    np.testing.assert_array_equal(attention.gate.queries(x, positions), expected)
    wide = make_attention("seer", GATES["double"] | {"gate_dim": 16}, **model)
    assert wide.gate.config.rotary_dim == 8
