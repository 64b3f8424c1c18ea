"""Pictures hold their numbers, on pages that can be read."""

import numpy as np
import pytest

from sparseformer_jax import figures
from sparseformer_jax.attention import routing
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation import pictures
from sparseformer_jax.evaluation.inspection import Window
from sparseformer_jax.evaluation.sums import Losses
from sparseformer_jax.figures import Shown, ShownLayer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def losses():
    tokens = np.full(130, 2.0)
    tokens[-1] = 0
    return Losses(np.arange(130.0) * tokens * np.log(2), tokens, {"density": np.array([1.0, 0.25])})


def window(num_layers, num_heads, kinds=("attended",)):
    """Two tiles a side; the weight of each kind is its number, from 1 on, over their sum."""
    kept = np.zeros((num_heads, 2, 2))
    kept[:, 0, 0] = 1
    kept[:, 1, 0] = 0.5
    numbers = dict(
        zip(kinds, np.arange(1, len(kinds) + 1) / sum(range(len(kinds) + 1)), strict=True)
    )
    weights = {kind: np.full((num_heads, 7, 7), number / 7) for kind, number in numbers.items()}
    shares = {kind: weight.sum(-1) for kind, weight in weights.items()}
    layers = (
        [{kind: x[kind] for kind in kinds}] * num_layers
        for x in (dict.fromkeys(kinds, kept), weights, shares)
    )
    return Window(list("abcdefg"), 4, *layers, {})


def texts(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def test_loss_shows_positions_means_and_the_whole(losses):
    loss, tokens = pictures.loss_figure(losses, "run").axes
    positions, means, whole = (line.get_ydata() for line in loss.lines)
    np.testing.assert_array_equal(positions, losses.bits)
    assert list(means[:2]) == pytest.approx([1, 4])  # of three positions each
    assert means[-2] == pytest.approx(127)
    assert np.isnan(means[-1])  # it has one position, and no token
    assert list(whole) == pytest.approx([64, 64])
    labels = [text.get_text() for text in loss.get_legend().texts]
    assert labels == ["each position", "mean of 3 positions", "all 258 tokens: 64.000"]
    assert (loss.get_ylabel(), tokens.get_ylabel()) == ("loss (bits per token)", "tokens")
    assert tokens.get_xlabel() == "position in the window"


def test_means_weigh_tokens(losses):
    losses.tokens[:3] = [1, 0, 3]
    losses.nll[:3] = np.log(2) * np.array([0 * 1, 0, 2 * 3])
    centres, means = pictures.binned(losses, 3)
    assert (centres[0], means[0]) == (1, (0 * 1 + 2 * 3) / 4)
    assert centres[-1] == 129  # the last bin has one position, and no token
    assert np.isnan(means[-1])


def test_density_is_a_bar_a_layer(losses):
    (panel,) = pictures.density_figure(losses.diagnostics["density"], "run").axes
    assert [bar.get_height() for bar in panel.patches] == [1, 0.25]
    labels = [text.get_text() for text in panel.get_legend().texts]
    assert sorted(labels) == ["a layer", "mean of layers: 0.625"]


def test_perplexity_over_density_marks_the_evaluation_among_others():
    points = [
        {"density": density, "perplexity": perplexity, "loss": 0.0}
        for density, perplexity in ((0.4, 5.0), (1.0, 3.0), (0.2, 7.0))
    ]
    (panel,) = pictures.sweep_figure(points, "run").axes
    others, own = (line.get_xydata().tolist() for line in panel.lines)
    assert others == [[0.2, 7], [1, 3]]
    assert own == [[0.4, 5]]
    labels = [text.get_text() for text in panel.get_legend().texts]
    assert labels == ["other choices", "this evaluation: 5 at 0.400"]


def test_tiles_take_the_colours_of_their_kinds_by_share():
    tiles = {"a": np.array([[1.0, 0.5], [0, 0]]), "b": np.array([[0, 0.5], [0.25, 0]])}
    image = pictures.mixed(tiles, {"a": "#ff0000", "b": "#00ff00"})
    np.testing.assert_allclose(image[0], [[1, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_allclose(image[1], [[0.75, 1, 0.75], [1, 1, 1]])


def test_a_panel_a_layer_and_head():
    (page,) = pictures.kept_figures(window(2, 3), "run")
    assert len(page.axes) == 6
    assert [panel.get_title() for panel in page.axes[:3]] == ["head 0", "head 1", "head 2"]
    assert [panel.get_ylabel() for panel in page.axes[::3]] == [
        "layer 0\nquery position",
        "layer 1\nquery position",
    ]
    image = page.axes[0].images[0].get_array()
    np.testing.assert_allclose(image[1, 0], (1 + np.asarray(image[0, 0])) / 2)
    assert page.axes[0].get_xlim() == (0, 7)
    assert texts(page) == ["attended: all", "none"]


def test_weights_are_shaded_by_those_of_the_query():
    (page,) = pictures.weight_figures(window(1, 1, ("a", "b")), "run")
    weights = {"a": np.array([[1 / 3]]), "b": np.array([[2 / 3]])}
    shades = {kind: np.sqrt(weight) for kind, weight in weights.items()}
    colours = dict(zip("ab", figures.COLOURS, strict=False))
    image = page.axes[0].images[0].get_array()
    np.testing.assert_allclose(image[0, 0], pictures.mixed(shades, colours)[0, 0])
    assert texts(page) == ["a: the largest", "b: the largest", "none"]


def test_weight_by_kind_is_a_stack_a_layer():
    (page,) = pictures.share_figures(window(2, 3, ("a", "b")), "run")
    titles = [panel.get_title(loc="left") for panel in page.axes]
    assert titles == [f"layer {i}: a 33%, b 67% of all weight" for i in range(2)]
    first, second = (part.get_paths()[0].vertices[:, 1] for part in page.axes[0].collections)
    assert (first.min(), second.max()) == (0, 1)
    assert first.max() == second.min() == pytest.approx(1 / 3)
    assert texts(page) == ["a", "b"]


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_many_layers_and_heads_are_pages_and_none_of_earlier_ones_stays(tmp_path, losses):
    (tmp_path / "kept_mine.png").touch()
    pictures.save(tmp_path, pictures.draw(losses, window(7, 2, ("a", "b")), {}, "run"))
    pages = [f"{group}_{page}.png" for group in ("kept", "weights") for page in (1, 2)]
    of_kinds = ["weight_by_kind_1.png", "weight_by_kind_2.png"]
    others = ["density.png", "kept_mine.png", "loss_by_position.png"]
    assert names(tmp_path) == sorted([*pages, *of_kinds, *others])
    for file in (tmp_path / page for page in pages):
        assert file.read_bytes().startswith(PNG)
    losses = Losses(losses.nll, losses.tokens)
    pictures.save(tmp_path, pictures.draw(losses, window(1, 1), {}, "run"))
    assert names(tmp_path) == sorted([*others[1:], "kept.png", "weights.png"])


def routed(selection, **arrays):
    options = routing.Options(num_clusters=3, window_size=2, selection=selection)
    members = np.zeros((1, 3, 4), bool)
    members[0, 0, :2] = members[0, 2, 1] = members[0, 1, 2] = True
    arrays = {"head": np.array([1]), "members": members, "mates": np.array([[0, 1, 2, 1]])}
    layer = ShownLayer(options, arrays | {"sizes": np.array([[1, 0, 3]])})
    series = {"train/largest_cluster": ([1, 2], [0.5, 0.7]), "train/untaken": ([1, 2], [0.4, 0.3])}
    return routing.Method.figures(Shown("run", ["a", " ", "\n", "<eos>"], {2: layer}, series))


@pytest.mark.parametrize(
    ("tokens", "labels"),
    [
        (["a", "\t", "漢", "\x00", "<eos>", "$"], ["a", "→", "·", "·", "◆", "$"]),
        (["$x^$", "on e", "漢字"], ["$x^$", "on␣e", "··"]),
    ],
)
def test_tokens_are_labels_whatever_they_are(tokens, labels):
    figure, panels = figures.new(1, height=1.0)
    figures.text_axis(panels[0, 0], tokens)
    assert [label.get_text() for label in panels[0, 0].get_xticklabels()] == labels
    assert figures.pixels(figure).shape == (110, 880, 3)


@pytest.mark.parametrize("selection", ["causal", "paper"])
def test_routing_draws_its_clusters(selection):
    (page,) = routed(selection)["clusters"]
    (panel,) = page.axes
    said = {
        "causal": "of 4 tokens 25% have no mate before them; 25% of the mates lie beyond the window of 2",
        "paper": "of 4 tokens 25% picked by no cluster, 25% by several",
    }
    assert panel.get_title(loc="left") == f"layer 2, head 1: {said[selection]}"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["a", "␣", "↵", "◆"]
    image = np.asarray(panel.images[0].get_array())
    assert (image == 1).all(-1).tolist()[0] == [False, False, True, False]
    assert len(texts(page)) == 1 + (selection == "paper")

    (page,) = routed(selection)["cluster_sizes"]
    training, now, *untaken = page.axes
    assert training.lines[0].get_ydata().tolist() == [0.5, 0.7]
    assert now.lines[0].get_ydata().tolist() == [0.75, 0.25, 0]
    assert [panel.lines[0].get_ydata().tolist() for panel in untaken] == [[0.4, 0.3]] * (
        selection == "paper"
    )


def test_the_folder_is_made_and_mistakes_are_told_before_the_work(tmp_path, monkeypatch):
    pictures.prepare(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: is a file; name a folder"):
        pictures.prepare(tmp_path / "file")
    monkeypatch.setattr(pictures, "has_matplotlib", lambda: False)
    with pytest.raises(ConfigError, match=r'needs matplotlib: pip install "sparseformer_jax\[plo'):
        pictures.prepare(tmp_path / "c")
    assert not (tmp_path / "c").exists()
