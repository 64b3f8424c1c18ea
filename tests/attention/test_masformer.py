"""MASFormer is softmax over a short span but in its full layers, and refuses the rest."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from sparseformer_jax import registry
from sparseformer_jax.attention import dense, masformer
from tests.attention.comparison import (
    assert_masked_softmax,
    assert_same_on_mesh,
    make_attention,
)

SPANS = ("block", "block_and_previous", "window")
DENSE_OPTIONS = [{"span": span, "span_size": 500} for span in SPANS]


def span_mask(span, size, num_tokens):
    """The token mask [1, T, T]."""
    i, j = np.ogrid[:num_tokens, :num_tokens]
    blocks = i // size - j // size
    near = {
        "block": blocks == 0,
        "block_and_previous": blocks <= 1,
        "window": i - j < size,
    }
    return ((j <= i) & near[span])[None]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("num_tokens", "size"), [(1111, 300), (2048, 512), (700, 1)])
def test_density_of_many_tiles(span, num_tokens, size):
    attention = make_attention("masformer", {"span": span, "span_size": size})
    pairs = num_tokens * (num_tokens + 1) / 2
    expected = span_mask(span, size, num_tokens).sum() / pairs
    assert attention.density(num_tokens) == pytest.approx(expected)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    ("num_tokens", "size", "model"),
    [
        (32, 8, {}),
        (37, 5, {"num_kv_heads": 4, "attention_soft_cap": 0.3}),
        (19, 1, {"attention_scale": 1.0, "position": "none"}),
        (13, 40, {"num_kv_heads": 1}),
    ],
    ids=str,
)
@pytest.mark.representative("32-*", "37-*block_and_previous", "13-*-window")
def test_softmax_over_the_span(span, num_tokens, size, model):
    attention = make_attention("masformer", {"span": span, "span_size": size}, **model)
    mask = span_mask(span, size, num_tokens)
    pairs = num_tokens * (num_tokens + 1) / 2
    assert attention.density(num_tokens) == pytest.approx(mask.sum() / pairs)
    assert_masked_softmax(attention, mask)


@pytest.mark.parametrize(
    ("span", "size", "sizes"),
    [
        ("block", 4, {"context": 8}),
        ("block", 8, {"tensor": 2, "context": 2, "data": 2}),
        ("block", 40, {"tensor": 2, "fsdp": 4}),
        ("block_and_previous", 4, {"context": 4, "tensor": 2}),
        ("block_and_previous", 7, {"context": 8}),
        ("window", 5, {"context": 8}),
    ],
    ids=str,
)
def test_spans_may_cross_devices(span, size, sizes):
    attention = make_attention("masformer", {"span": span, "span_size": size})
    assert_same_on_mesh(attention, sizes, 32)


def test_a_device_needs_whole_blocks():
    attention = make_attention("masformer", {"span_size": 8})
    with pytest.raises(ValueError, match=r"mesh\.context leaves 4 queries .* 8 tokens"):
        assert_same_on_mesh(attention, {"context": 8}, 32)


@pytest.mark.parametrize(
    ("options", "full_layers"),
    [
        ({"num_full_layers": 2}, [0, 1]),
        ({"num_full_layers": 0}, []),
        ({"full_layers": (3, 1)}, [1, 3]),
        ({"full_layers": ()}, []),
    ],
    ids=str,
)
def test_full_layers(options, full_layers):
    options = masformer.Options(**options)
    kinds = masformer.Method.layer_kinds(options, 4)
    found = [i for i, (method, _) in enumerate(kinds) if method is dense.Method]
    assert found == full_layers
    assert {method for method, _ in kinds} <= {masformer.Method, dense.Method}


@pytest.mark.parametrize(
    ("options", "is_causal", "message"),
    [
        ({"span_size": 0}, True, r"span_size=0\b.*at least 1"),
        ({"full_layers": (0, 4, 9)}, True, r"full_layers=.*4.*0 to 3"),
        ({"full_layers": (-1,)}, True, r"full_layers=.*-1.*0 to 3"),
        ({"num_full_layers": 5}, True, r"num_full_layers=5\b.*4"),
        ({"num_full_layers": -1}, True, r"num_full_layers=-1\b"),
        ({"span": "blocks"}, True, r"span='blocks'"),
        ({}, False, r"is_causal=True"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, is_causal, message):
    section = ConfigDict({"name": "masformer", **options})
    model = {"num_layers": 4, "is_causal": is_causal}
    with pytest.raises(ValueError, match=message) as error:
        masformer.check(registry.options("attention", section), ConfigDict({"model": model}))
    assert "\n" not in str(error.value)
