"""Pictures hold their numbers, on pages that can be read."""

import numpy as np
import pytest

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation import pictures
from sparseformer_jax.evaluation.inspection import Kept, Losses

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def losses():
    bits = np.arange(130.0)
    bits[-1] = np.nan
    tokens = np.full(130, 2.0)
    tokens[-1] = 0
    return Losses(bits, tokens, np.array([1.0, 0.25]))


def kept(num_layers, num_heads):
    share = np.zeros((num_heads, 2, 2))
    share[:, 0, 0] = 1
    share[:, 1, 0] = 0.5
    return Kept(7, 4, [{"attended": share}] * num_layers)


def texts(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def test_loss_shows_positions_means_and_the_whole(losses):
    loss, tokens = pictures.loss_figure(losses, "run").axes
    positions, means, whole = (line.get_ydata() for line in loss.lines)
    np.testing.assert_array_equal(positions, losses.bits)
    assert list(means[:2]) == [1, 4]  # of three positions each
    assert means[-2] == 127
    assert np.isnan(means[-1])  # it has one position, and no token
    assert set(whole) == {64}
    labels = [text.get_text() for text in loss.get_legend().texts]
    assert labels == ["each position", "mean of 3 positions", "all 258 tokens: 64.000"]
    assert (loss.get_ylabel(), tokens.get_ylabel()) == ("loss (bits per token)", "tokens")
    assert tokens.get_xlabel() == "position in the window"


def test_means_weigh_tokens(losses):
    losses.tokens[:3] = [1, 0, 3]
    centres, means = pictures.binned(losses, 3)
    assert (centres[0], means[0]) == (1, (0 * 1 + 2 * 3) / 4)
    assert centres[-1] == 129  # the last bin has one position, and no token
    assert np.isnan(means[-1])


def test_density_is_a_bar_a_layer(losses):
    (panel,) = pictures.density_figure(losses.density, "run").axes
    assert [bar.get_height() for bar in panel.patches] == [1, 0.25]
    labels = [text.get_text() for text in panel.get_legend().texts]
    assert sorted(labels) == ["a layer", "mean of layers: 0.625"]


def test_tiles_take_the_colours_of_their_kinds_by_share():
    tiles = {"a": np.array([[1.0, 0.5], [0, 0]]), "b": np.array([[0, 0.5], [0.25, 0]])}
    image = pictures.mixed(tiles, {"a": "#ff0000", "b": "#00ff00"})
    np.testing.assert_allclose(image[0], [[1, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_allclose(image[1], [[0.75, 1, 0.75], [1, 1, 1]])


def test_a_panel_a_layer_and_head():
    (page,) = pictures.kept_figures(kept(2, 3), "run")
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


def test_many_layers_and_heads_are_pages(tmp_path, losses):
    drawn = pictures.draw(tmp_path, losses, kept(7, 9), "run")
    names = [*(f"kept_{page}.png" for page in range(1, 5)), "density.png", "loss_by_position.png"]
    assert sorted(file.name for file in drawn) == sorted(names)
    for file in drawn:
        assert file.read_bytes().startswith(PNG)


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
