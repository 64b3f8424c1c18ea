"""Every variant of Combiner decodes from summaries what it computes of the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import mesh
from tests.attention.comparison import make_attention
from tests.model.harness import normal, place, put

SIZE, WIDTH = 23, 9
LENGTHS = np.asarray([3, 9, 1, 8], np.int32)
VARIANTS = [
    ({"variant": "fixed", "span_size": 4, "pool": "deepsets"}, {"num_kv_heads": 1}),
    ({"variant": "fixed", "span_size": 1}, {"attention_soft_cap": 0.3}),
    ({"variant": "axial_row", "span_size": 4}, {"qkv_bias": True, "out_bias": True}),
    ({"variant": "axial_mixture", "span_size": 4, "mixture_pool": "sum"}, {"num_kv_heads": 4}),
    ({"variant": "axial_mixture", "span_size": 3, "pool": "deepsets"}, {}),
    ({"variant": "log_sparse", "pool": "deepsets"}, {}),
    ({"variant": "log_sparse"}, {"num_kv_heads": 4, "position": "none"}),
    *(({"variant": variant, "span_size": 50}, {}) for variant in ("axial_row", "axial_mixture")),
]


@pytest.mark.parametrize(("options", "model"), VARIANTS, ids=str)
@pytest.mark.representative("*row*_bias*", "*log*deepsets*")
def test_decoding_equals_the_whole_sequence(options, model):
    """Prompts of different lengths, a few tokens after each, then one at a time, across spans."""
    attention = make_attention("combiner", options, **model)
    x = normal(0, len(LENGTHS), SIZE, attention.config.embed_dim)
    whole = whole_sequence(attention, x)
    decode = jax.jit(attention.decode)
    cache, start, rows = attention.init_cache(len(LENGTHS), SIZE), 0 * LENGTHS, np.arange(4)
    one = np.ones_like(LENGTHS)
    for lengths in (LENGTHS, LENGTHS[::-1], *[one] * 12):
        width = 1 if lengths is one else WIDTH
        index = np.minimum(start[:, None] + np.arange(width), SIZE - 1)
        is_own = (np.arange(width) < lengths[:, None])[..., None]
        # What fills a row up comes from elsewhere.
        tokens = np.where(is_own, x[rows[:, None], index], normal(1, *index.shape, x.shape[-1]))
        output, cache = decode(tokens, start, cache, lengths)
        expected = is_own * whole[rows[:, None], index]
        # Sums of at most 23 terms in another order, twice: weights, then projections.
        np.testing.assert_allclose(is_own * output, expected, atol=1e-5 * np.abs(whole).max())
        start = start + lengths
    assert start.max() == SIZE


@pytest.mark.parametrize(("options", "model"), VARIANTS, ids=str)
@pytest.mark.representative("*row*_bias*")
def test_devices_share_rows_and_heads(options, model):
    """One row alone ends its span, so devices take different ways."""
    attention = make_attention("combiner", options, **model)
    x, token = (normal(width, 8, width, attention.config.embed_dim) for width in (5, 1))

    @jax.jit
    def run(module, x, token):
        lengths = jnp.asarray([3, 4, 1, 2, 1, 0, 5, 4])
        _, cache = module.decode(x, 0 * lengths, module.init_cache(8, SIZE), lengths)
        return module.decode(token, lengths, cache)

    alone = jax.device_get(run(attention, x, token))
    tensor = min(2, attention.config.num_kv_heads)
    with jax.set_mesh(mesh.make_mesh({"data": 4, "tensor": tensor, "fsdp": 2 // tensor})):
        rows = (put(array, "batch", None, None) for array in (x, token))
        together = jax.device_get(run(place(attention), *rows))
    scale = np.abs(alone[0]).max()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale), alone, together)


@pytest.mark.parametrize(
    ("variant", "of_tokens", "of_queries", "of_keys"),
    [
        # Tokens' keys and values, summaries' values and pooled queries, summaries' keys.
        ("fixed", 2 * 16, 62 + 1, 62),
        ("axial_row", 2 * 16, 2 * 62 * 16 + 16, 0),
        ("axial_mixture", 2 * 1000, 2 * 62 * 16 + 2 * 16 + 2 * 16, 2 * 62 * 16 + 2 * 16),
        ("log_sparse", 2 * 512, 2 * 10, 2 * 10),
    ],
)
def test_what_is_kept_of_a_thousand_tokens(variant, of_tokens, of_queries, of_keys):
    attention = make_attention("combiner", {"variant": variant, "span_size": 16})
    config = attention.config
    # The grid holds whole rows.
    of_tokens += 2 * 8 * (variant == "axial_mixture")
    cache = jax.eval_shape(lambda: attention.init_cache(3, 1000, num_layers=2))
    entries = config.num_heads * of_queries + config.num_kv_heads * (of_keys + of_tokens)
    expected = entries * config.head_dim + 16 * config.embed_dim * (variant == "axial_row")
    assert sum(x.size for x in cache.values()) == 2 * 3 * expected


@pytest.mark.parametrize("variant", ["fixed", "axial_row", "axial_mixture", "log_sparse"])
@pytest.mark.representative("axial_row")
def test_a_token_changes_the_cache_in_place(variant):
    attention = make_attention("combiner", {"variant": variant, "span_size": 32})
    graphdef, state = nnx.split(attention)
    cache = jax.eval_shape(lambda: attention.init_cache(1, 1024, num_layers=6))

    def layers(state, x, start, cache):
        def layer(cache, index):
            output, cache = nnx.merge(graphdef, state).decode(x, start, cache, layer=index)
            return cache, output

        return jax.lax.scan(layer, cache, jnp.arange(6))

    x = jax.ShapeDtypeStruct((1, 1, attention.config.embed_dim), jnp.float32)
    start = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = jax.jit(layers, donate_argnums=3).lower(state, x, start, cache).compile()
    assert not [line for line in compiled.as_text().splitlines() if is_copy(line, cache)]


def is_copy(line, cache):
    """Whether a line of HLO copies an array of all layers."""
    shapes = {",".join(map(str, array.shape)) for array in cache.values()}
    return any(f"f32[{shape}]" in line.split(" copy(")[0] for shape in shapes) and " copy(" in line


def whole_sequence(attention, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return np.asarray(jax.jit(lambda x: attention(x, positions, None).output)(x))
