"""SeerAttention reads prompts, and writes token by token, as it attends to whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh, presets, registry
from sparseformer_jax.attention import _gates, _query_chunks
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.state import ModelDef
from tests.attention.comparison import make_attention
from tests.attention.seer_cases import SIZE, inputs_of, make, states
from tests.model.harness import normal, place, put

DECODED = {
    "first": ("decode", {"token_budget": 3 * SIZE, "keeps_first": True}),
    "threshold": ("group", {"threshold": 0.3}),
    "capacity": ("group", {"threshold": 0.05, "capacity": 2}),
    "dense": ("group", {}),
    "more_than_there_are": ("decode", {"token_budget": 512}),
}


@pytest.mark.representative("first", "capacity")
@pytest.mark.parametrize("case", DECODED)
def test_decodes_what_the_whole_sequence_gives(case, monkeypatch):
    """After a prompt that ends inside a block; blocks end while one token comes after another.

    The prompt is read in chunks of queries.
    """
    monkeypatch.setattr(_query_chunks, "_WIDTH", 8)
    kind, options = DECODED[case]
    attention, length = make(kind, **options), 45
    x = states(attention, 0, 2, length)
    positions = jnp.tile(jnp.arange(length), (2, 1))
    whole = jax.jit(attention)(x, positions, None).output
    decode, start = jax.jit(attention.decode), jnp.asarray([13, 20])
    cache = attention.init_cache(2, length)
    _, cache = decode(x[:, :20], jnp.zeros(2, jnp.int32), cache, start)
    for _ in range(25):
        rows = jnp.arange(2)
        found, cache = decode(x[rows, start][:, None], start, cache)
        limit = 1e-5 * np.abs(whole).max()
        np.testing.assert_allclose(found[:, 0], whole[rows, start], atol=limit)
        start = start + 1


def test_cached_keys_are_those_of_the_whole_sequence():
    """Turned by their first token, also where single tokens ended them."""
    attention, length = make("group", token_budget=2 * SIZE), 45
    x = states(attention, 0, 1, length)
    inputs = inputs_of(attention, x)
    options, whole = attention.options, length // SIZE
    pooled = _gates.pool(inputs.unrotated_key, SIZE, options.key_pools, jnp.ones((1, length), bool))
    expected = attention.gate.keys(pooled, SIZE * jnp.arange(pooled.shape[1])[None])
    cache, decode = attention.init_cache(1, length), jax.jit(attention.decode)
    for start, count in [(0, 19), *((n, 1) for n in range(19, length))]:
        _, cache = decode(x[:, start : start + count], jnp.asarray([start]), cache)
    found = cache["block_key"][0]
    np.testing.assert_allclose(found[:, :whole], expected[:, :whole], atol=1e-5)
    assert not found[:, whole:].any()  # is not over
    assert cache["unrotated_key"].shape[2] == SIZE


PROMPTS = {
    "density": ("prefill", {"density": 0.75}),
    "rows": ("double", {"density": 0.75, "dense_rows": 2, "keeps_first": True}),
    "threshold": ("double", {"threshold": 0.45}),
    "budget": ("prefill", {"token_budget": 2 * SIZE}),
}


@jax.jit
def whole_sequence(attention, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return attention(x, positions, None).output


def pieces(x, starts, counts):
    """As many tokens of each row as there are, of which `counts` from `starts` on come first."""
    index = jnp.minimum(jnp.asarray(starts)[:, None] + jnp.arange(x.shape[1]), x.shape[1] - 1)
    return jnp.take_along_axis(x, index[..., None], 1), jnp.asarray(starts), jnp.asarray(counts)


@pytest.mark.representative("threshold")
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_read_as_whole_sequences(case):
    """Rows of different lengths, whose last blocks are short, at once and in two pieces.

    The second begins with a block, which single tokens ended.
    """
    kind, options = PROMPTS[case]
    attention, lengths = make(kind, **options), (45, 27)
    x = states(attention, 0, 2, 45)
    decode = jax.jit(attention.decode)

    def read(cache, starts, counts):
        x_of_piece, starts, counts = pieces(x, starts, counts)
        return decode(x_of_piece, starts, cache, counts)

    empty = attention.init_cache(2, 45)
    at_once, _ = read(empty, (0, 0), lengths)
    _, cache = read(empty, (0, 0), (21, 13))
    for place_of_one in range(3):
        x_of_one, start, _ = pieces(x, (21 + place_of_one, 13 + place_of_one), (1, 1))
        _, cache = decode(x_of_one[:, :1], start, cache)
    last_piece, _ = read(cache, (24, 16), (21, 11))
    for row, (length, begin) in enumerate(zip(lengths, (24, 16), strict=True)):
        expected = whole_sequence(attention, x[row : row + 1, :length])[0]
        limit = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(at_once[row, :length], expected, atol=limit)
        found = last_piece[row, : length - begin]
        np.testing.assert_allclose(found, expected[begin:], atol=limit)


def test_layers_that_scan_read_prompts_as_whole_sequences():
    config = presets.baseline("tiny")
    config.data.seq_len = 24
    config.attention = registry.method_config("attention", "seer", block_size=4, density=0.75)
    model_def = ModelDef(config)
    params, _ = model_def.init(jax.random.key(0))
    model = model_def.model({name: 3 * x for name, x in params.items()}, {}, 0)
    tokens, lengths = jax.random.randint(jax.random.key(1), (2, 24), 0, 256), jnp.asarray([24, 18])

    @jax.jit
    def read(model, tokens):
        return model.decode(tokens, jnp.zeros(2, int), model.init_cache(2, 24), lengths)[0]

    expected = jax.jit(lambda model, tokens: model.features(tokens).hidden)(model, tokens[1:, :18])
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(read(model, tokens)[1, :18], expected[0], atol=limit)


def dense_twin(attention):
    dense = make_attention("dense", {})
    for shared in ("query", "key", "value", "out"):
        setattr(dense, shared, getattr(attention, shared))
    return dense


def test_what_makes_no_blocks_of_queries_attends_densely():
    """Single tokens, and pieces that begin inside a block, as row 0's second one."""
    attention, x = make("prefill", density=0.2), states(make("prefill"), 0, 2, 40)

    @jax.jit
    def run(module):
        _, cache = module.decode(x[:, :24], jnp.zeros(2, int), module.init_cache(2, 40), last)
        piece, cache = module.decode(x[:, 24:39], last, cache)
        one, _ = module.decode(x[:, 39:], last + 15, cache)
        return piece, one

    last = jnp.asarray([23, 24])
    (piece, one), (dense_piece, dense_one) = run(attention), run(dense_twin(attention))
    limit = 1e-5 * np.abs(dense_piece).max()
    np.testing.assert_allclose(piece[0], dense_piece[0], atol=limit)
    np.testing.assert_allclose(one, dense_one, atol=limit)
    assert np.abs(piece[1] - dense_piece[1]).max() > 1000 * limit


def test_prompts_are_read_alike_on_a_mesh():
    """Rows and heads are shared; each query head has pooled keys of its own."""
    attention = make("prefill", density=0.4)
    x, start = states(attention, 0, 4, 27), jnp.zeros(4, int)
    lengths = jnp.asarray([27, 9, 16, 20])

    def run(attention, x):
        output, cache = attention.decode(x, start, attention.init_cache(4, 27), lengths)
        return output, cache["block_key"]

    expected = jax.jit(run)(attention, x)
    with jax.set_mesh(mesh.make_mesh({"data": 4, "tensor": 2})):
        found = jax.device_get(jax.jit(run)(place(attention), put(x, "batch", "seq", None)))
    is_token = np.arange(27) < np.asarray(lengths)[:, None]
    limit = 1e-5 * np.abs(expected[0]).max()
    np.testing.assert_allclose(found[0][is_token], expected[0][is_token], atol=limit)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_text_is_generated_by_gates_alone():
    attention = make("prefill", density=0.5, selector="oracle")
    cache = attention.init_cache(1, 32)
    x = jnp.asarray(normal(0, 1, 4, attention.config.embed_dim))
    with pytest.raises(ConfigError, match=r"attention.selector='oracle': .*; take 'gate'"):
        attention.decode(x, jnp.zeros(1, jnp.int32), cache)
