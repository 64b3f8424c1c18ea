"""Pictures of gates show the blocks they would choose beside those that matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import figures, registry
from sparseformer_jax.attention import _gate_figures, seer
from sparseformer_jax.figures import Shown, ShownLayer
from tests.attention.seer_cases import SIZE, kinds, make, states

LENGTH = 45


@pytest.mark.representative("prefill", "decode")
@kinds
def test_gates_are_shown_beside_the_largest_weights_of_blocks(kind):
    attention = make(kind)
    x, positions = states(attention, 0, 1, LENGTH), jnp.arange(LENGTH)[None]
    told, weights = jax.jit(
        lambda module: (
            module.inspect(x, positions, None),
            module.effective_attention(x, positions),
        )
    )(attention)
    gate, target, past = (np.asarray(told[name][0]) for name in ("gate", "target", "past"))
    starts = np.arange(0, LENGTH, SIZE)
    expected = np.maximum.reduceat(np.asarray(weights[0], np.float64), starts, axis=2)
    if kind in ("prefill", "double"):
        expected = np.maximum.reduceat(expected, starts, axis=1)
    else:
        expected = expected.reshape(2, 2, LENGTH, -1).max(1) * past
    expected /= np.maximum(expected.sum(-1, keepdims=True), 1e-9)
    np.testing.assert_allclose(target, expected, atol=1e-5)
    own = np.arange(len(past)) if kind in ("prefill", "double") else np.arange(LENGTH) // SIZE
    np.testing.assert_array_equal(past, np.arange(len(starts)) < own[:, None])
    is_some = expected.sum(-1) > 0
    np.testing.assert_allclose(gate.sum(-1), is_some, atol=1e-5)
    assert not gate[target == 0].any()


def layer(gate, target, num_heads=1):
    """One of four blocks of as many queries, all of whose past blocks count."""
    arrays = {
        "gate": np.stack([gate] * num_heads),
        "target": np.stack([target] * num_heads),
        "past": np.tri(4, k=-1, dtype=bool),
    }
    return ShownLayer(seer.Options(block_size=SIZE), arrays)


TRUE = np.array([[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0.5, 0.1, 0.4, 0], [0.1, 0.2, 0.3, 0.4]])
FALSE = np.array([[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0.5, 0.1, 0.4, 0], [0.3, 0.2, 0.1, 0.4]])


def draw(*layers, series=None):
    tokens = ["a"] * 4 * SIZE
    return seer.Method.figures(Shown("run", tokens, dict(enumerate(layers)), series or {}))


def test_maps_mark_the_highest_quarter_of_past_blocks():
    (page,) = draw(layer(FALSE, TRUE))["blocks"]
    gate, true = (axes.images[0].get_array() for axes in page.axes)
    assert [axes.get_title() for axes in page.axes] == ["head 0, gate", "head 0, true"]
    orange, dark = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for c in COLOURS)
    for image, found, shares in ((gate, 0, FALSE), (true, 2, TRUE)):
        best = 1 - np.sqrt(shares[3, found] / 0.4) * (1 - orange)
        np.testing.assert_allclose(image[3, found], best, atol=1e-6)
        np.testing.assert_allclose(image[3, 3], dark, atol=1e-6)
        np.testing.assert_allclose(image[0, 1:], 1)  # nothing to see


COLOURS = (figures.COLOURS[1], figures.DARK)


def test_numbers_are_means_over_rows_with_past_blocks():
    shown = _gate_figures.numbers(shown_layer(FALSE))
    assert shown["recall"] == pytest.approx(2 / 3)
    assert shown["mass"] == pytest.approx((0.25 + 0.5 + 0.1) / 3)
    assert shown["true_mass"] == pytest.approx((0.25 + 0.5 + 0.3) / 3)
    assert shown["kl"] == pytest.approx((0.1 * np.log(1 / 3) + 0.3 * np.log(3)) / 3)
    exact = _gate_figures.numbers(shown_layer(TRUE))
    assert (exact["recall"], exact["kl"]) == (1, 0)


def shown_layer(gate):
    shown = layer(gate, TRUE)
    return _gate_figures._Layer(0, shown.options, **shown.arrays)


def test_recall_is_drawn_by_layer_and_over_training():
    layers = (layer(FALSE, TRUE, 2), layer(TRUE, TRUE, 2))
    (page,) = draw(*layers)["recall"]
    recall, mass, kl = page.axes
    assert [bar.get_height() for bar in recall.patches] == pytest.approx([2 / 3, 1])
    assert len(recall.collections[0].get_offsets()) == 4
    assert kl.patches[1].get_height() == 0
    best = [segment[:, 1] for segment in mass.collections[1].get_segments()]
    np.testing.assert_allclose(best, 0.35)
    series = {f"train/{name}/layer_1": ([1, 2], [0.5, 0.6]) for name in ("kl", "recall", "mass")}
    (page,) = draw(*layers, series=series)["recall"]
    assert [list(axes.lines[0].get_ydata()) for axes in page.axes[3:]] == [[0.5, 0.6]] * 3
    assert "over training" in page.get_suptitle()


def test_pages_hold_what_can_be_seen_and_nothing_is_drawn_of_one_block():
    pages = draw(*[layer(TRUE, TRUE, 5)] * 7)["blocks"]
    assert [len(page.axes) for page in pages] == [6 * 4, 6 * 6, 4, 6]
    alone = layer(TRUE, TRUE)
    alone.arrays["past"] = np.zeros((4, 4), bool)
    assert not draw(alone)


@pytest.mark.parametrize(
    ("gates", "options", "name", "amounts"),
    [
        ("prefill", {"threshold": 0.1, "capacity": 3}, "density", [0.1, 0.2, 0.3, 0.5]),
        ("prefill", {"density": 0.2, "joint": True}, "density", [0.1, 0.2, 0.3, 0.5]),
        ("decode", {"keeps_first": True}, "token_budget", [16, 24, 40]),
    ],
)
def test_a_sweep_goes_from_few_blocks_to_dense_attention(gates, options, name, amounts):
    section = registry.method_config("attention", "seer", gates=gates, block_size=8, **options)
    *sparse, dense = registry.sweep("attention", section, 80)
    assert [found[name] for found in sparse] == amounts
    for found in sparse:
        section.update(found)
        assert registry.options("attention", section).chooses
    section.update(dense)
    assert not registry.options("attention", section).chooses
