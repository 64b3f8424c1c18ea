"""S2-Attention is softmax over the paper's band and stripes, and refuses other options."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from pallas_kernels import block_sparse_attention
from sparseformer_jax import registry
from sparseformer_jax.attention import _block_sparse, dense, s2
from tests.attention.comparison import (
    assert_masked_softmax,
    assert_same_on_mesh,
    make_attention,
)

DENSE_OPTIONS = [{"vert_stride": 1}, {"local_blocks": 99}, {"num_dense_heads": 4}]


def band_and_stripes(options, num_heads, num_kv_heads, num_tokens, is_causal):
    """The token mask [N, T, T], pair by pair."""
    by_query_head = options.phase_by == "q_head"
    rows = num_heads if by_query_head else num_kv_heads
    stride, step = options.vert_stride, options.head_sliding_step
    if step is None:
        step = max(1, stride // num_heads)
    mask = np.zeros((num_heads, num_tokens, num_tokens), bool)
    for head, i, j in np.ndindex(mask.shape):
        m, n = i // options.block_size, j // options.block_size
        row = head if by_query_head else head // (num_heads // num_kv_heads)
        back, ahead = m - n, n - m
        near = back < options.local_blocks and ahead < options.local_blocks_right
        if options.stripes == "absolute":
            phase = 0 if options.homo_head else row * step
            stripe = (n + phase + options.head_sliding_offset) % stride == 0
        else:
            left = max(0, back - options.local_blocks + 1)
            right = max(0, ahead - options.local_blocks_right + 1)
            stripe = (left + right) % stride == 0
        dense_head = row >= rows - options.num_dense_heads
        mask[head, i, j] = (near or stripe or dense_head) and (not is_causal or j <= i)
    return mask


def options(**changes):
    return {"block_size": 4, "local_blocks": 1, "vert_stride": 3} | changes


@pytest.mark.parametrize(
    ("num_tokens", "changes", "model"),
    [
        (40, {}, {}),
        (40, {"vert_stride": 8}, {"num_heads": 2, "num_kv_heads": 1}),
        (37, {"local_blocks": 3, "vert_stride": 5, "block_size": 3}, {}),
        (30, {"phase_by": "kv_head", "head_sliding_offset": 1}, {"num_heads": 6}),
        (33, {"head_sliding_step": 2, "vert_stride": 7}, {"num_kv_heads": 4}),
        (26, {"head_sliding_step": 0, "head_sliding_offset": 5}, {}),
        (38, {"num_dense_heads": 1, "vert_stride": 6}, {}),
        (38, {"num_dense_heads": 1, "phase_by": "kv_head", "vert_stride": 6}, {}),
        (29, {"homo_head": True, "head_sliding_offset": 2}, {}),
        (35, {"local_blocks_right": 2, "vert_stride": 4}, {"is_causal": False}),
        (
            35,
            {"stripes": "relative", "local_blocks": 2, "local_blocks_right": 3},
            {"is_causal": False},
        ),
        (
            31,
            {"stripes": "relative", "num_dense_heads": 2, "vert_stride": 4},
            {"is_causal": False},
        ),
    ],
    ids=str,
)
@pytest.mark.representative(
    "40-{}-{}", "37-*", "30-*", "*num_dense_heads*kv_head*", "*stripes*dense*", "35-{'local*"
)
def test_softmax_over_band_and_stripes(num_tokens, changes, model):
    attention = make_attention("s2", options(**changes), **model)
    config = attention.config
    mask = band_and_stripes(
        attention.options,
        config.num_heads,
        config.num_kv_heads,
        num_tokens,
        config.is_causal,
    )
    dense_pairs = num_tokens * (num_tokens + 1) / 2 if config.is_causal else num_tokens**2
    assert mask.sum() < config.num_heads * dense_pairs
    assert attention.density(num_tokens) == pytest.approx(
        mask.sum() / config.num_heads / dense_pairs
    )
    assert_masked_softmax(attention, mask)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({"tensor": 2, "context": 4}, {"phase_by": "kv_head", "num_dense_heads": 1}),
        ({"tensor": 2, "data": 4}, {"head_sliding_step": 2, "vert_stride": 7}),
        ({"tensor": 2, "context": 4}, {"block_size": 16}),
        ({"context": 8}, {"homo_head": True, "block_size": 3}),
    ],
    ids=str,
)
def test_each_device_has_its_own_heads_and_queries(sizes, changes):
    assert_same_on_mesh(make_attention("s2", options(**changes)), sizes, 32)


@pytest.mark.parametrize(("block_size", "num_tokens"), [(8, 24), (4, 24), (3, 16)])
def test_blocks_may_cross_devices(block_size, num_tokens):
    attention = make_attention("s2", options(block_size=block_size))
    assert_same_on_mesh(attention, {"tensor": 2, "context": 4}, num_tokens)


@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 2, "data": 4}, {"context": 4, "data": 2}, {"tensor": 2, "context": 2, "data": 2}],
    ids=str,
)
@pytest.mark.parametrize("changes", [{}, {"homo_head": True}], ids=str)
def test_kernels_take_what_a_device_attends_to(sizes, changes, monkeypatch):
    """Whole blocks need no rule inside tiles, and whole sequences know where stripes stand."""
    masks = []

    def attend(query, key, value, block_mask, **limits):
        masks.append(block_mask)
        return block_sparse_attention(query, key, value, block_mask, **limits)

    monkeypatch.setattr(_block_sparse, "block_sparse_attention", attend)
    assert_same_on_mesh(make_attention("s2", options(**changes)), sizes, 32)
    assert len(masks) == 2
    for mask in masks:
        assert mask.inner_rule is None
        assert "context" in sizes or mask.rule is not None


@pytest.mark.parametrize(
    ("every", "dense_layers"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2])]
)
def test_dense_layers(every, dense_layers):
    kinds = s2.Method.layer_kinds(s2.Options(dense_every=every), 5)
    assert [i for i, (method, _) in enumerate(kinds) if method is dense.Method] == dense_layers
    assert {method for method, _ in kinds} <= {s2.Method, dense.Method}


def check(changes, **model):
    config = registry_config(changes, **model)
    s2.check(registry.options("attention", config.attention), config)


def registry_config(changes, **model):
    section = {"name": "s2", **options(**changes)}
    sizes = {"num_heads": 4, "num_kv_heads": 2, "is_causal": True} | model
    return ConfigDict({"attention": section, "model": sizes, "data": {"seq_len": 24}})


def test_fitting_options_pass():
    check({"block_size": 8, "num_dense_heads": 4})
    check({"stripes": "relative"}, is_causal=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 5}, r"block_size=5\b.*divide data\.seq_len=24"),
        ({"block_size": 0}, r"block_size=0\b.*at least 1"),
        ({"local_blocks": 0}, r"local_blocks=0\b.*at least 1"),
        ({"local_blocks_right": -1}, r"local_blocks_right=-1\b.*at least 1"),
        ({"vert_stride": 0}, r"vert_stride=0\b.*at least 1"),
        ({"head_sliding_step": -1}, r"head_sliding_step=-1\b.*not be negative"),
        ({"num_dense_heads": 5}, r"num_dense_heads=5\b.*at most 4"),
        (
            {"num_dense_heads": 3, "phase_by": "kv_head"},
            r"num_dense_heads=3\b.*at most 2",
        ),
        (
            {"num_dense_heads": 1, "homo_head": True},
            r"num_dense_heads=1\b.*homo_head=False",
        ),
        ({"stripes": "relative"}, r"stripes='relative'.*model\.is_causal=False"),
        ({"dense_every": -2}, r"dense_every=-2\b.*not be negative"),
        ({"phase_by": "head"}, r"phase_by='head'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        check(changes)
    assert "\n" not in str(error.value)
