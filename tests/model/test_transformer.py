"""The transformer is the one written out naively, for every family of settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax.attention import dense, masformer
from sparseformer_jax.attention.base import AttentionOutput
from sparseformer_jax.model.block import Block
from sparseformer_jax.model.transformer import Transformer
from tests.model import reference
from tests.model.harness import (
    assert_close,
    in_float64,
    layers,
    packed,
    pure,
    randomized,
    small_config,
)

GPT_NEO = {
    "num_kv_heads": 4,
    "position": "learned",
    "max_positions": 19,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "mlp": "gelu_tanh",
    "mlp_bias": True,
    "out_bias": True,
    "attention_scale": 1.0,
}
QWEN = {"qkv_bias": True, "qk_norm": True, "rope_theta": 1e6, "num_kv_heads": 1}
GEMMA = {
    "qk_norm": True,
    "norm_unit_offset": True,
    "post_norm": True,
    "mlp": "geglu_tanh",
    "embedding_scale": 20**0.5,
    "attention_soft_cap": 2.0,
    "logits_soft_cap": 3.0,
    "rope_local_layers": (0, 2),
    "rope_local_theta": 50.0,
}
FAMILIES = {
    "llama": {"tie_embeddings": False},
    "qwen": QWEN,
    "gpt_neo": GPT_NEO,
    "gemma": GEMMA,
    "encoder": {"is_causal": False, "position": "none", "mlp": "gelu"},
}


def make_model(attention=dense.Method, options=None, **changes):
    return Transformer(
        small_config(**changes), attention, options or dense.Options(), rngs=nnx.Rngs(0)
    )


@jax.jit
def run(model, *arguments):
    return model(*arguments)


def parameters(model):
    names = ("embedding", "position_embedding", "final_norm", "head")
    found = {name: getattr(model, name) for name in names}
    top = {name: pure(module) for name, module in found.items() if module is not None}
    return top | {"layers": [pure(block) for block in layers(model)]}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    model = randomized(lambda: make_model(**FAMILIES[family]))
    config, rng = model.config, np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, 19), np.int32)
    ids, positions = packed(rng, 2, 19)

    def expected(p):
        mask = reference.causal(19) if config.is_causal else True
        masks = [mask & reference.same_segment(ids)] * config.num_layers
        return reference.transformer(p, tokens, positions, masks, config)

    actual = run(model, tokens, positions, ids).logits
    assert_close(actual, in_float64(expected, parameters(model)), 1e-5)


def test_positions_count_from_zero_unless_told():
    model, tokens = make_model(), jnp.arange(14).reshape(2, 7)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    told = run(model, tokens, positions, 0 * tokens)
    assert_close(run(model, tokens), told, 1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_only_an_encoder_sees_the_future(is_causal):
    model, tokens = make_model(is_causal=is_causal), jnp.arange(9)[None]
    other = run(model, tokens.at[0, -1].set(20))
    moved = run(model, tokens).logits != other.logits
    assert bool(moved[:, -1].any())
    earlier = moved[:, :-1].any(-1)
    assert not earlier.any() if is_causal else earlier.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_number_of_parameters(family):
    config = small_config(**FAMILIES[family])
    d, f, h = config.embed_dim, config.mlp_dim, config.head_dim
    n, k = config.num_heads, config.num_kv_heads
    norm = 2 * d if config.norm == "layernorm" else d
    attention = 2 * d * h * (n + k) + 2 * h * config.qk_norm
    attention += config.qkv_bias * h * (n + 2 * k) + config.out_bias * d
    matrices = 3 if config.mlp in ("swiglu", "geglu_tanh") else 2
    mlp = matrices * d * f + config.mlp_bias * ((matrices - 1) * f + d)
    tables = config.vocab_size * (1 if config.tie_embeddings else 2)
    tables += config.max_positions * (config.position == "learned")
    norms = 4 if config.post_norm else 2
    expected = tables * d + norm + config.num_layers * (attention + mlp + norms * norm)
    model = nnx.eval_shape(lambda: make_model(**FAMILIES[family]))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == expected


def test_more_tokens_than_learned_positions_are_refused():
    model = make_model(**GPT_NEO)
    with pytest.raises(ValueError, match=r"20 tokens exceeds model\.max_positions=19"):
        model(jnp.zeros((1, 20), jnp.int32))


@pytest.mark.parametrize("number", [-1, 13])
def test_tokens_beyond_the_vocabulary_are_refused(number):
    model = make_model(vocab_size=13)
    tokens = jnp.zeros((1, 4), jnp.int32).at[0, 2].set(number)
    with pytest.raises(ValueError, match=r"token ids from .*model\.vocab_size=13"):
        model(tokens)
    model(jnp.full((1, 4), 12))


def test_diagnostics_come_in_layer_order():
    options = masformer.Options(span_size=3, full_layers=(1, 4))
    model = make_model(masformer.Method, options, num_layers=6)
    sparse = next(layers(model)).attention.density(9)
    densities = run(model, jnp.zeros((1, 9), jnp.int32)).diagnostics["density"]
    assert sparse < 0.5
    assert_close(densities, jnp.asarray([sparse, 1, sparse, sparse, 1, sparse]), 1e-6)


def test_attention_and_mlp_drop_different_entries():
    """With both adding 1 to nothing, 1 / keep = 2 is left where one of them is dropped."""
    block = Block(small_config(dropout=0.5), dense.Method, dense.Options(), rngs=nnx.Rngs(0))
    zeros, positions = jnp.zeros((4, 50, 20)), jnp.zeros((4, 50), jnp.int32)

    def ones(*arguments, **options):
        return jnp.ones_like(zeros)

    block.attention = lambda *arguments, **options: AttentionOutput(ones())
    block.mlp = ones
    added, _ = block(zeros, positions, None, jax.random.key(0))
    fractions = [float(jnp.mean(added == value)) for value in (0, 2, 4)]
    np.testing.assert_allclose(fractions, [0.25, 0.5, 0.25], atol=0.05)


@pytest.mark.parametrize("softmax_dtype", ["float32", "bfloat16"])
def test_dtypes(softmax_dtype):
    model = make_model(compute_dtype="bfloat16", softmax_dtype=softmax_dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    tokens = jnp.zeros((1, 4), jnp.int32)
    output = jax.eval_shape(run, model, tokens)
    assert output.logits.dtype == jnp.dtype(softmax_dtype)
    assert next(layers(model)).mlp(jnp.ones((1, 4, 20))).dtype == jnp.bfloat16
