"""Dense attention is softmax over all keys, or all earlier ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import presets, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import validate
from tests.attention.comparison import assert_masked_softmax, make_attention

DENSE_OPTIONS = [{}]


@pytest.mark.parametrize(
    ("num_tokens", "model"),
    [
        (29, {"num_kv_heads": 4}),
        (17, {"num_kv_heads": 1, "is_causal": False, "position": "none"}),
        (31, {"attention_soft_cap": 0.3, "attention_scale": 1.0, "rope_theta": 50.0}),
        (23, {"qk_norm": True, "qkv_bias": True, "out_bias": True}),
        (1, {}),
    ],
    ids=str,
)
def test_softmax_over_all(num_tokens, model):
    attention = make_attention("dense", {}, **model)
    mask = np.ones((4, num_tokens, num_tokens), bool)
    if attention.config.is_causal:
        mask = np.tril(mask)
    assert_masked_softmax(attention, mask)


@pytest.mark.parametrize("is_causal", [True, False])
def test_nothing_is_skipped(is_causal):
    assert make_attention("dense", {}, is_causal=is_causal).density(19) == 1.0


@pytest.mark.parametrize("name", ["dense", "masformer", "s2"])
def test_an_unknown_implementation_is_told(name):
    config = presets.baseline("tiny")
    config.attention = registry.method_config("attention", name, implementation="flash")
    with pytest.raises(ConfigError, match=r"^attention.implementation='flash' must name one"):
        validate(config)


def test_an_implementation_that_cannot_run_here_says_why():
    attention = make_attention("dense", {"implementation": "pallas_tpu"})
    x = jax.ShapeDtypeStruct((1, 8, attention.config.embed_dim), jnp.float32)
    positions = segment_ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    message = r"^attention.implementation='pallas_tpu': pallas_tpu: needs a TPU"
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(attention, x, positions, segment_ids)
