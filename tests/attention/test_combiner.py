"""Combiner is one softmax over tokens and summaries of spans, and sees all of the past."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from sparseformer_jax import mesh, registry
from sparseformer_jax.attention import combiner
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig
from tests.attention import combiner_reference
from tests.attention.comparison import assert_same_on_mesh, make_attention
from tests.model.harness import assert_close, in_float64, normal, packed, place, pure, put

DENSE_OPTIONS = [{"span_size": 500}, {"span_size": 1}, {"variant": "axial_row", "span_size": 500}]
# Every allowed key has a weight, and most through a summary.
VISITS_SUMMARIES = True
VARIANTS = ("fixed", "axial_row", "axial_mixture", "log_sparse")


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize(
    ("variant", "num_tokens", "documents", "options", "model"),
    [
        ("fixed", 21, 3, {"span_size": 4}, {}),
        ("fixed", 17, 1, {"span_size": 5, "pool": "deepsets"}, {"num_kv_heads": 1}),
        ("axial_row", 22, 3, {"span_size": 5}, {"num_kv_heads": 4, "attention_soft_cap": 0.3}),
        ("axial_row", 14, 1, {"span_size": 4}, {"qkv_bias": True, "out_bias": True}),
        ("axial_mixture", 22, 3, {"span_size": 5}, {"attention_scale": 0.7}),
        ("axial_mixture", 18, 1, {"span_size": 4, "mixture_pool": "sum"}, {"position": "none"}),
        ("axial_mixture", 14, 2, {"span_size": 4, "pool": "deepsets"}, {}),
        ("log_sparse", 21, 3, {}, {"attention_soft_cap": 0.3}),
        ("log_sparse", 17, 1, {"pool": "deepsets"}, {"num_kv_heads": 4}),
        ("fixed", 3, 1, {"span_size": 2}, {}),
        ("axial_mixture", 3, 1, {"span_size": 2}, {}),
        ("log_sparse", 3, 1, {}, {}),
    ],
    ids=str,
)
@pytest.mark.representative(
    "fixed-21*-both_ways",
    "fixed-17*-causal",
    "axial_row-22*-causal",
)
def test_outputs_weights_and_gradients(variant, num_tokens, documents, options, model, is_causal):
    options = {"variant": variant} | options
    attention = make_attention("combiner", options, is_causal=is_causal, **model)
    config, graphdef = attention.config, nnx.graphdef(attention)
    ids, positions = packed(np.random.default_rng(num_tokens), 2, num_tokens, documents)
    x, cotangent = (normal(seed, 2, num_tokens, config.embed_dim) for seed in range(2))
    segment_ids = jnp.asarray(ids) if documents > 1 else None

    def actual(parameters, x):
        module = nnx.merge(graphdef, parameters)
        output = module(x, jnp.asarray(positions), segment_ids).output
        weights = module.effective_attention(x, jnp.asarray(positions), segment_ids)
        return jnp.vdot(cotangent, output), (output, weights)

    def expected(parameters, x):
        rows = [
            combiner_reference.attention(
                parameters, x[row], positions[row], ids[row], config, attention.options
            )
            for row in range(2)
        ]
        output, weights = map(jnp.stack, zip(*rows, strict=True))
        return jnp.vdot(cotangent, output), (output, weights)

    results = jax.jit(jax.grad(actual, (0, 1), has_aux=True))(pure(attention), x)
    truth = in_float64(jax.grad(expected, (0, 1), has_aux=True), pure(attention), x)
    assert_close(results, truth, 1e-5)

    weights = np.asarray(results[1][1])
    allowed = ids[:, None, :, None] == ids[:, None, None, :]
    if is_causal:
        allowed &= np.tri(num_tokens, dtype=bool)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(allowed, weights.shape))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_future_and_other_documents_do_not_change_a_bit(variant):
    attention = make_attention("combiner", {"variant": variant, "span_size": 5})
    x = normal(0, 8, 37, attention.config.embed_dim)
    ids, positions = packed(np.random.default_rng(0), 8, 37)
    other = ids == np.arange(8)[:, None] % 3
    future = np.arange(37) >= np.linspace(1, 36, 8).astype(int)[:, None]
    run = jax.jit(lambda module, *arguments: module(*arguments).output)
    one = jnp.broadcast_to(jnp.arange(37), ids.shape), 0 * ids
    for hidden, arguments in ((other, (positions, ids)), (future, one)):
        changed = np.where(hidden[..., None], 1e15 * normal(1, *x.shape), x).astype(np.float32)
        before, after = (np.asarray(run(attention, y, *arguments)) for y in (x, changed))
        np.testing.assert_array_equal(before[~hidden], after[~hidden])
        assert (before[hidden] != after[hidden]).mean() > 0.5


@pytest.mark.parametrize(
    ("options", "model", "sizes"),
    [
        ({"variant": "fixed", "span_size": 4}, {}, {"context": 4, "tensor": 2}),
        ({"variant": "fixed", "span_size": 4}, {"is_causal": False}, {"context": 8}),
        (
            {"variant": "axial_row", "span_size": 4},
            {"out_bias": True, "qkv_bias": True},
            {"context": 4, "tensor": 2},
        ),
        ({"variant": "axial_row", "span_size": 4}, {"is_causal": False}, {"context": 4, "fsdp": 2}),
        ({"variant": "axial_mixture", "span_size": 4}, {}, {"context": 4, "tensor": 2}),
        ({"variant": "axial_mixture", "span_size": 4}, {"is_causal": False}, {"context": 8}),
        ({"variant": "log_sparse"}, {}, {"context": 8}),
        ({"variant": "log_sparse"}, {"is_causal": False}, {"context": 4, "tensor": 2}),
        ({"variant": "fixed", "span_size": 4, "pool": "deepsets"}, {}, {"tensor": 2, "data": 4}),
    ],
    ids=str,
)
@pytest.mark.representative("*fixed*-{}-*tensor': 2}", "*row*out_bias*", "*log*-{}-*")
def test_spans_of_other_devices(options, model, sizes):
    assert_same_on_mesh(make_attention("combiner", options, **model), sizes, 32)


@pytest.mark.exhaustive
def test_gradients_do_not_depend_on_the_mesh():
    attention = make_attention("combiner", {"variant": "axial_row", "span_size": 4}, out_bias=True)
    x = normal(0, 4, 16, attention.config.embed_dim)
    ids, positions = packed(np.random.default_rng(0), 4, 16)

    @jax.jit
    def gradients(module, *arguments):
        graphdef, state = nnx.split(module)

        def loss(state, x):
            output = nnx.merge(graphdef, state)(x, *arguments[1:]).output
            return jnp.sum(jnp.sin(output))

        return jax.grad(loss, (0, 1))(state, arguments[0])

    expected = jax.device_get(gradients(attention, x, positions, ids))
    with jax.set_mesh(mesh.make_mesh({"context": 2, "tensor": 2, "fsdp": 2})):
        arguments = (
            put(x, "batch", "seq", None),
            *(put(i, "batch", "seq") for i in (positions, ids)),
        )
        actual = jax.device_get(gradients(place(attention), *arguments))
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("variant", "num_tokens", "size"),
    [("fixed", 21, 4), ("axial_mixture", 22, 5), ("log_sparse", 21, 1), ("axial_row", 22, 5)],
)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both_ways"])
def test_density_counts_pairs_visited(variant, num_tokens, size, is_causal):
    options = {"variant": variant, "span_size": size}
    attention = make_attention("combiner", options, is_causal=is_causal)
    one = np.zeros(num_tokens, int)
    direct, uses, members, _ = combiner_reference.tables(variant, num_tokens, size, is_causal, one)
    full = num_tokens * (num_tokens + 1) // 2 if is_causal else num_tokens**2
    seen = direct.sum() + uses.sum()
    visited = attention.density(num_tokens) * full
    # What summaries read comes on top: at most once a way a token and level, or a row of pairs.
    most = {
        "fixed": 2 * num_tokens,
        "log_sparse": 2 * num_tokens * num_tokens.bit_length(),
        "axial_row": num_tokens * size,
        "axial_mixture": 2 * num_tokens * (num_tokens // size + 2 * size),
    }
    assert seen <= round(visited, 6) <= seen + most[variant]


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"span_size": 0}, {}, r"span_size=0 must be at least 1"),
        ({"variant": "axial"}, {}, r"variant='axial'"),
        ({"mixture_pool": "sum"}, {}, r"mixture_pool='sum': 'fixed' has no mixture"),
        ({"mask_empty": False}, {}, r"mask_empty=False: 'fixed' has no empty spans"),
        ({"variant": "axial_row", "pool": "deepsets"}, {}, r"pool='deepsets': 'axial_row' pools"),
        ({"count_own_span": True}, {}, r"count_own_span=True: bidirectional only"),
        ({"implementation": "cuda"}, {}, r"cuda"),
        ({"span_size": 24}, {"context": 4}, r"span_size=24: must divide the 16 tokens .*context=4"),
        ({"span_size": 32}, {"context": 4}, r"span_size=32: must divide the 16 tokens"),
        ({"variant": "log_sparse"}, {"context": 4, "seq_len": 48}, r"leaves 12 tokens .* power of"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, model, message):
    section = ConfigDict({"name": "combiner", **options})
    model = {"seq_len": 64, "context": 1} | model
    config = {
        "model": {"is_causal": True},
        "data": {"seq_len": model["seq_len"]},
        "mesh": {"context": model["context"]},
    }
    with pytest.raises(ValueError, match=message) as error:
        combiner.check(registry.options("attention", section), ConfigDict(config))
    assert "\n" not in str(error.value)


def test_a_device_needs_whole_spans():
    attention = make_attention("combiner", {"span_size": 8})
    with pytest.raises(ValueError, match=r"span_size=8: must divide the 4 tokens .*context=8"):
        assert_same_on_mesh(attention, {"context": 8}, 32)


def test_queries_of_all_keys_are_needed():
    attention = make_attention("combiner", {"span_size": 8})
    query, key = jnp.ones((1, 3, 4, 6)), jnp.ones((1, 10, 2, 6))
    with pytest.raises(ValueError, match="3 queries of 10 keys; pass the queries of all"):
        attention.attend(Inputs(query, key, key), Shard(num_heads=4))


def test_empty_spans_as_released_need_whole_rows_of_one_document():
    options = {"variant": "axial_mixture", "span_size": 4, "mask_empty": False}
    attention = make_attention("combiner", options, is_causal=False)
    with pytest.raises(ValueError, match="mask_empty=False: averages whole lines"):
        attention(jnp.ones((1, 7, 20)), jnp.arange(7)[None], None)


@pytest.mark.exhaustive
def test_the_docstring_has_an_example_that_runs():
    lines = combiner.__doc__.split("\n\n    config = ")[1].split("\n\n")[0]
    names = {"ModelConfig": ModelConfig, "combiner": combiner, "nnx": nnx, "jnp": jnp}
    exec(textwrap.dedent("    config = " + lines), names)
    assert names["output"].shape == (2, 50, 32)
    assert np.isfinite(names["output"]).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.representative("2-*", "1-fixed")
def test_few_tokens(variant, num_tokens):
    attention = make_attention("combiner", {"variant": variant, "span_size": 1})
    weights = jax.jit(lambda module, x: module.effective_attention(x))(
        attention, normal(0, 1, num_tokens, attention.config.embed_dim)
    )
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(
        weights[0] > 0, np.broadcast_to(np.tri(num_tokens), weights[0].shape)
    )
