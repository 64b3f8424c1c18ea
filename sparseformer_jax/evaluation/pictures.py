"""Pictures of a trained model: kept pairs of every layer and head, loss by position, density."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation.inspection import Kept, Losses
from sparseformer_jax.evaluation.plots import has_matplotlib

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure

_COLOURS = ("#0b3c5d", "#e07a1f", "#2a9d8f", "#d1495b")  # of the kinds of pairs
_INCHES, _DPI = 8, 110
_MAX_HEADS, _MAX_LAYERS = 8, 6  # of a page
_MAX_BINS = 64


def prepare(folder: Path) -> None:
    """Makes the folder of the pictures, before the work of filling it is done.

    Raises:
      ConfigError: matplotlib is missing, or the path is a file.
    """
    if not has_matplotlib():
        raise ConfigError(
            f'--plots={folder}: needs matplotlib: pip install "sparseformer_jax[plots]"'
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--plots={folder}: is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)


def draw(folder: Path, losses: Losses, kept: Kept, title: str) -> list[Path]:
    """Writes the pictures and returns their paths.

    They are loss_by_position.png, density.png where layers report one, and kept.png, or
    kept_1.png, kept_2.png, ... where layers and heads do not fit on one page.
    """
    drawn = {"loss_by_position.png": loss_figure(losses, title)}
    if losses.density.size:
        drawn["density.png"] = density_figure(losses.density, title)
    pages = list(kept_figures(kept, title))
    names = [f"kept_{page}.png" for page in range(1, len(pages) + 1)]
    drawn |= zip(names if len(pages) > 1 else ["kept.png"], pages, strict=True)
    for name, figure in drawn.items():
        figure.savefig(folder / name, format="png")
    return [folder / name for name in drawn]


def loss_figure(losses: Losses, title: str) -> "Figure":
    """Returns loss over the position in the window, above the number of tokens there."""
    figure, (loss, tokens) = _figure(3.6, 2, sharex=True, height_ratios=(3, 1))
    num_positions = len(losses.bits)
    size = -(-num_positions // _MAX_BINS)
    loss.plot(losses.bits, color="#8ecae6", linewidth=0.8, label="each position")
    if size > 1:
        centres, means = binned(losses, size)
        loss.plot(centres, means, color="#0b3c5d", label=f"mean of {size} positions")
    total = losses.tokens.sum()
    mean = np.nansum(losses.bits * losses.tokens) / total
    loss.axhline(mean, color="#d1495b", linewidth=1, label=f"all {total:.0f} tokens: {mean:.3f}")
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
    bits = np.add.reduceat(np.nan_to_num(losses.bits) * losses.tokens, starts)
    ends = np.minimum(starts + size, len(losses.bits))
    with np.errstate(invalid="ignore"):
        return (starts + ends - 1) / 2, bits / tokens


def density_figure(density: Float[np.ndarray, " L"], title: str) -> "Figure":
    """Returns the attended fraction of pairs, a bar a layer."""
    figure, (panel,) = _figure(2.6, 1)
    width = min(0.7, len(density) / 8)
    panel.bar(np.arange(len(density)), density, color="#0b3c5d", width=width, label="a layer")
    mean = density.mean()
    panel.axhline(mean, color="#d1495b", linewidth=1, label=f"mean of layers: {mean:.3f}")
    panel.set(
        ylabel="density (fraction of pairs)",
        xlabel="layer",
        title=f"{title}: attended pairs over those of full attention",
        ylim=(0, 1.3 * density.max()),
    )
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    return figure


def kept_figures(kept: Kept, title: str) -> Iterator["Figure"]:
    """Yields pages with a row a layer and a column a head; tiles are shaded by kept pairs."""
    heads = len(next(iter(kept.layers[0].values())))
    kinds = list(dict.fromkeys(itertools.chain.from_iterable(kept.layers)))
    colours = dict(zip(kinds, itertools.cycle(_COLOURS), strict=False))
    for first in range(0, len(kept.layers), _MAX_LAYERS):
        rows = range(first, min(first + _MAX_LAYERS, len(kept.layers)))
        for left in range(0, heads, _MAX_HEADS):
            columns = range(left, min(left + _MAX_HEADS, heads))
            yield _page(kept, rows, columns, colours, title)


def _page(kept: Kept, layers: range, heads: range, colours: dict[str, str], title: str) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    side = min(2.0, (_INCHES - 0.6) / len(heads))  # inches of a panel
    width = max(5.5, side * len(heads) + 0.6)
    figure = Figure(figsize=(width, side * len(layers) + 1.3), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(layers), len(heads), squeeze=False, sharex=True, sharey=True)
    for row, layer in zip(panels, layers, strict=True):
        for panel, head in zip(row, heads, strict=True):
            tiles = {kind: fraction[head] for kind, fraction in kept.layers[layer].items()}
            _draw_tiles(panel, mixed(tiles, colours), kept)
        row[0].set_ylabel(f"layer {layer}\nquery position", fontsize=8)
    for panel, head in zip(panels[0], heads, strict=True):
        panel.set_title(f"head {head}", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("key position", fontsize=8)
    figure.suptitle(
        f"{title}: pairs with a weight, first {kept.num_tokens} tokens of the split\n"
        f"shade: their fraction in each tile of {kept.tile_size} x {kept.tile_size} pairs",
        fontsize=9,
    )
    patches = [Patch(facecolor=colour, label=f"{kind}: all") for kind, colour in colours.items()]
    none = Patch(facecolor="white", edgecolor="0.6", linewidth=0.5, label="none")
    figure.legend(
        handles=[*patches, none],
        loc="outside lower center",
        ncols=len(patches) + 1,
        fontsize=8,
        frameon=False,
    )
    return figure


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


def _draw_tiles(panel: Any, image: np.ndarray, kept: Kept) -> None:
    """The first query lies on top; the last tile may stick out."""
    end = len(image) * kept.tile_size
    panel.imshow(image, interpolation="nearest", extent=(0, end, end, 0))
    panel.set(xlim=(0, kept.num_tokens), ylim=(kept.num_tokens, 0))
    panel.locator_params(nbins=3, integer=True)
    panel.tick_params(labelsize=6, length=2)
    panel.spines[:].set(color="0.6", linewidth=0.6)


def _figure(height: float, rows: int, **options: Any) -> tuple["Figure", Any]:
    """A figure of README's width, and its panels from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES, height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels
