"""Pictures of a trained model: kept pairs, weight by kind, loss by position, density, its own."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sparseformer_jax import figures
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation.inspection import Window
from sparseformer_jax.evaluation.plots import has_matplotlib
from sparseformer_jax.evaluation.sums import Losses
from sparseformer_jax.figures import Series, Shown

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure

_MAX_HEADS, _MAX_LAYERS = 8, 6  # of a page
_MAX_BINS = 64


def prepare(folder: Path, field: str = "--plots") -> None:
    """Makes the folder of the pictures, before the work of filling it is done.

    Args:
      folder: that a user named.
      field: by which.

    Raises:
      ConfigError: matplotlib is missing, or the path is a file.
    """
    if not has_matplotlib():
        raise ConfigError(
            f'{field}={folder}: needs matplotlib: pip install "sparseformer_jax[plots]"'
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{field}={folder}: is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)


def draw(losses: Losses, window: Window, series: Series, title: str) -> dict[str, "Figure"]:
    """Returns the pictures by name.

    They are "loss_by_position"; "density" where layers report one; "kept"; "weights";
    "weight_by_kind" where pairs are of several kinds; and METHOD_NAME of those that methods draw
    themselves. Of several pages they are NAME_1, NAME_2 and so on.

    Args:
      losses: of all evaluated windows.
      window: of one of them.
      series: what the run has logged until then.
      title: which method, step and split.
    """
    groups: dict[str, Sequence[Figure]] = {"loss_by_position": [loss_figure(losses, title)]}
    if "density" in losses.diagnostics:
        groups["density"] = [density_figure(losses.diagnostics["density"], title)]
    groups["kept"] = list(kept_figures(window, title))
    groups["weights"] = list(weight_figures(window, title))
    if any(len(kinds) > 1 for kinds in window.shares):
        groups["weight_by_kind"] = list(share_figures(window, title))
    for method, layers in window.own.items():
        own = method.figures(Shown(title, window.tokens, layers, series))
        module = method.__module__.rpartition(".")[2]
        groups |= {f"{module}_{name}": pages for name, pages in own.items()}
    return _numbered(groups)


def _numbered(groups: Mapping[str, Sequence["Figure"]]) -> dict[str, "Figure"]:
    """The pages by name, numbered where a group has several."""
    return {
        f"{name}_{number}" if len(pages) > 1 else name: page
        for name, pages in groups.items()
        for number, page in enumerate(pages, start=1)
    }


def save(folder: Path, drawn: Mapping[str, "Figure"]) -> list[Path]:
    """Writes the pictures and returns their paths; pages that an earlier call left there go."""
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        figures.save(figure, path)
    fixed = {"density", "weight_by_kind", "perplexity_by_density"}
    groups = {*fixed, *(re.sub(r"_\d+$", "", name) for name in drawn)}
    for path in set(folder.glob("*.png")) - set(paths):
        if re.sub(r"_\d+$", "", path.stem) in groups:
            path.unlink()
    return paths


def loss_figure(losses: Losses, title: str) -> "Figure":
    """Returns loss over the position in the window, above the number of tokens there."""
    figure, panels = figures.new(2, height=3.6, sharex=True, height_ratios=(3, 1))
    loss, tokens = panels[:, 0]
    num_positions = len(losses.bits)
    size = -(-num_positions // _MAX_BINS)
    loss.plot(losses.bits, color=figures.PALE, linewidth=0.8, label="each position")
    if size > 1:
        centres, means = binned(losses, size)
        loss.plot(centres, means, color=figures.DARK, label=f"mean of {size} positions")
    total = losses.tokens.sum()
    mean = losses.nll.sum() / math.log(2) / total
    loss.axhline(mean, color=figures.RED, linewidth=1, label=f"all {total:.0f} tokens: {mean:.3f}")
    loss.set(ylabel="loss (bits per token)", title=f"{title}: loss by position in the window")
    loss.legend(fontsize=8, framealpha=0.9, edgecolor="white")
    tokens.fill_between(
        np.arange(num_positions), losses.tokens, color="0.6", step="mid", label="evaluated tokens"
    )
    tokens.set(
        ylabel="tokens", xlabel="position in the window", xlim=(0, max(1, num_positions - 1))
    )
    tokens.set_ylim(0, 2 * losses.tokens.max())
    tokens.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def binned(
    losses: Losses, size: int
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Returns the centres of bins of so many positions, and the mean loss of their tokens."""
    starts = np.arange(0, len(losses.bits), size)
    tokens = np.add.reduceat(losses.tokens, starts)
    bits = np.add.reduceat(losses.nll, starts) / math.log(2)
    ends = np.minimum(starts + size, len(losses.bits))
    with np.errstate(invalid="ignore"):
        return (starts + ends - 1) / 2, bits / tokens


def density_figure(density: Float[np.ndarray, " L"], title: str) -> "Figure":
    """Returns the attended fraction of pairs, a bar a layer."""
    figure, panels = figures.new(1, height=2.6)
    panel = panels[0, 0]
    width = min(0.7, len(density) / 8)
    panel.bar(np.arange(len(density)), density, color=figures.DARK, width=width, label="a layer")
    mean = density.mean()
    panel.axhline(mean, color=figures.RED, linewidth=1, label=f"mean of layers: {mean:.3f}")
    panel.set(
        ylabel="density (fraction of pairs)",
        xlabel="layer",
        title=f"{title}: attended pairs over those of full attention",
        ylim=(0, 1.3 * density.max()),
    )
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    return figure


def sweep_figure(points: Sequence[Mapping[str, float]], title: str) -> "Figure":
    """Returns perplexity over density: of the evaluation, which comes first, and of others."""
    own, *others = ((point["density"], point["perplexity"]) for point in points)
    figure, panels = figures.new(1, height=3.6)
    panel = panels[0, 0]
    panel.plot(*zip(*sorted(others), strict=True), "o-", color=figures.DARK, label="other choices")
    panel.plot(*own, "D", color=figures.RED, label=f"this evaluation: {own[1]:.4g} at {own[0]:.3f}")
    panel.set(
        xlabel="density (fraction of pairs), mean of layers",
        ylabel="perplexity",
        title=f"{title}: perplexity by density",
    )
    panel.legend(frameon=False, fontsize=8)
    return figure


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What `_pages` shades: of each layer by kind, how dark [N, M, M] every tile of pairs is."""

    layers: list[dict[str, Float[np.ndarray, "N M M"]]]
    tile_size: int
    num_tokens: int
    title: str
    darkest: str


def kept_figures(window: Window, title: str) -> Iterator["Figure"]:
    """Yields pages with a row a layer and a column a head; tiles are shaded by kept pairs."""
    size, num_tokens = window.tile_size, len(window.tokens)
    heading = (
        f"{title}: pairs with a weight, first {num_tokens} tokens of the split\n"
        f"shade: their fraction in each tile of {size} x {size} pairs"
    )
    return _pages(_Pairs(window.kept, size, num_tokens, heading, "all"), _colours(window))


def weight_figures(window: Window, title: str) -> Iterator["Figure"]:
    """Yields the same of the weights of the first tokens, pair by pair."""
    num_tokens = next(iter(window.weights[0].values())).shape[-1]
    shades = []
    for kinds in window.weights:
        most = np.sum(list(kinds.values()), axis=0).max(-1, keepdims=True)
        most = np.maximum(most, np.finfo(np.float32).tiny)
        shades.append({kind: np.sqrt(weight / most) for kind, weight in kinds.items()})
    heading = (
        f"{title}: weights of pairs, first {num_tokens} tokens of the split\n"
        "shade: root of the weight over the query's largest"
    )
    return _pages(_Pairs(shades, 1, num_tokens, heading, "the largest"), _colours(window))


def _pages(pairs: _Pairs, colours: dict[str, str]) -> Iterator["Figure"]:
    """Figures with a row a layer and a column a head, as many as can be seen on each."""
    heads = len(next(iter(pairs.layers[0].values())))
    for first in range(0, len(pairs.layers), _MAX_LAYERS):
        rows = range(first, min(first + _MAX_LAYERS, len(pairs.layers)))
        for left in range(0, heads, _MAX_HEADS):
            columns = range(left, min(left + _MAX_HEADS, heads))
            yield _page(pairs, rows, columns, colours)


def _colours(window: Window) -> dict[str, str]:
    """The colour of every kind of pairs."""
    kinds = dict.fromkeys(itertools.chain.from_iterable(window.kept))
    return dict(zip(kinds, itertools.cycle(figures.COLOURS), strict=False))


def share_figures(window: Window, title: str) -> Iterator["Figure"]:
    """Yields pages with a panel a layer: how queries divide their weight among kinds of pairs."""
    from matplotlib.patches import Patch

    colours, place = _colours(window), np.arange(len(window.tokens))
    for first in range(0, len(window.shares), _MAX_LAYERS):
        layers = range(first, min(first + _MAX_LAYERS, len(window.shares)))
        figure, panels = figures.new(len(layers), height=1.5 * len(layers) + 1, sharex=True)
        for panel, layer in zip(panels[:, 0], layers, strict=True):
            means = {kind: share.mean(0) for kind, share in window.shares[layer].items()}
            kinds = [colours[kind] for kind in means]
            panel.stackplot(place, *means.values(), colors=kinds, step="mid")
            panel.set(ylim=(0, 1), xlim=(0, max(1, place[-1])), ylabel="share of weight")
            found = ", ".join(f"{kind} {mean.mean():.0%}" for kind, mean in means.items())
            panel.set_title(f"layer {layer}: {found} of all weight", fontsize=8, loc="left")
        panels[-1, 0].set_xlabel("query position")
        figure.suptitle(f"{title}: weight by kind of pair, mean of heads", fontsize=10)
        patches = [Patch(facecolor=colour, label=kind) for kind, colour in colours.items()]
        _legend(figure, patches)
        yield figure


def _page(pairs: _Pairs, layers: range, heads: range, colours: dict[str, str]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    side = min(2.0, (figures.WIDTH - 0.6) / len(heads))  # inches of a panel
    size = max(5.5, side * len(heads) + 0.6), side * len(layers) + 1.3
    figure = Figure(figsize=size, dpi=figures.DPI, layout="constrained")
    panels = figure.subplots(len(layers), len(heads), squeeze=False, sharex=True, sharey=True)
    for row, layer in zip(panels, layers, strict=True):
        for panel, head in zip(row, heads, strict=True):
            tiles = {kind: shade[head] for kind, shade in pairs.layers[layer].items()}
            _draw_tiles(panel, mixed(tiles, colours), pairs)
        row[0].set_ylabel(f"layer {layer}\nquery position", fontsize=8)
    for panel, head in zip(panels[0], heads, strict=True):
        panel.set_title(f"head {head}", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("key position", fontsize=8)
    figure.suptitle(pairs.title, fontsize=9)
    patches = [
        Patch(facecolor=colour, label=f"{kind}: {pairs.darkest}")
        for kind, colour in colours.items()
    ]
    none = Patch(facecolor="white", edgecolor="0.6", linewidth=0.5, label="none")
    _legend(figure, [*patches, none])
    return figure


def _legend(figure: "Figure", handles: list[Any]) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )


def mixed(
    tiles: dict[str, Float[np.ndarray, "M M"]], colours: dict[str, str]
) -> Float[np.ndarray, "M M 3"]:
    """Returns the colour of each tile: white where no pair is kept, else its kinds' by share."""
    from matplotlib.colors import to_rgb

    ink = (
        fraction[..., None] * (1 - np.array(to_rgb(colours[kind])))
        for kind, fraction in tiles.items()
    )
    return np.clip(1 - sum(ink), 0, 1)


def _draw_tiles(panel: Any, image: np.ndarray, pairs: _Pairs) -> None:
    """The first query lies on top; the last tile may stick out."""
    end = len(image) * pairs.tile_size
    panel.imshow(image, interpolation="nearest", extent=(0, end, end, 0))
    panel.set(xlim=(0, pairs.num_tokens), ylim=(pairs.num_tokens, 0))
    panel.locator_params(nbins=3, integer=True)
    panel.tick_params(labelsize=6, length=2)
    panel.spines[:].set(color="0.6", linewidth=0.6)
