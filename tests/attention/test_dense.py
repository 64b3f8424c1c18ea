"""Dense attention is softmax over all keys, or all earlier ones."""

import numpy as np
import pytest

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
