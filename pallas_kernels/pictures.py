"""Pictures of block masks: in text, and as PNG with the optional matplotlib."""

import os
from typing import Any

import numpy as np
from jaxtyping import Int

from pallas_kernels.geometry import Geometry

Kinds = Int[np.ndarray, "Hp M J"]

_MAX_COLUMNS = 64
_SYMBOLS = np.array([".", "+", "#"])
_NAMES = ("empty", "partial", "full")
_COLOURS = ("#f1f3f5", "#8ecae6", "#0b3c5d")
_MAX_DRAWN = 256  # Tiles a side of a panel: more would be thinner than a pixel.
_MAX_PANELS_ABREAST = 4
_PANEL_INCHES = 2.4


def text(kinds: Kinds, title: str) -> str:
    """Returns one character per block, a picture per pattern head.

    Masks of more than 64 blocks a side are shown coarsely: a character stands for a
    square of blocks, and says "full" or "empty" only if all of them are.
    """
    heads, size = len(kinds), _squares(kinds, _MAX_COLUMNS)
    legend = "  ".join(f"{sign} {name}" for sign, name in zip(_SYMBOLS, _NAMES, strict=True))
    lines = [title, legend]
    if size > 1:
        lines.append(f"each character is {size} x {size} blocks")
    for head, picture in enumerate(_coarse(kinds, size)):
        lines += [f"pattern {head} of {heads}"] if heads > 1 else []
        lines += ["".join(row) for row in _SYMBOLS[picture]]
    return "\n".join(lines)


def save(
    kinds: Kinds, geometry: Geometry, offset: int, title: str, path: str | os.PathLike[str]
) -> None:
    """Writes a PNG with a panel per pattern head, axes in tokens.

    Masks of more than 256 blocks a side are drawn coarsely, as in `text`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.patches
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'sparseformer_jax[plots]'"
        ) from error
    heads = len(kinds)
    columns = min(heads, _MAX_PANELS_ABREAST)
    rows = -(-heads // columns)
    height = _PANEL_INCHES * min(max(geometry.query_length / geometry.key_length, 0.4), 2)
    figure = matplotlib.figure.Figure(
        figsize=(max(4.5, columns * _PANEL_INCHES), rows * (height + 0.3) + 0.9),
        dpi=150,
        layout="constrained",
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    size = _squares(kinds, _MAX_DRAWN)
    if size > 1:
        title += f"\ndrawn in squares of {size} x {size} tiles"
    tile = (size * geometry.query_block_size, size * geometry.key_block_size)
    palette = matplotlib.colors.ListedColormap(_COLOURS)
    for panel in panels.flat[heads:]:
        panel.set_axis_off()
    for head, picture in enumerate(_coarse(kinds, size)):
        panel = panels.flat[head]
        _draw(panel, picture, tile, offset, palette)
        panel.set_xlim(0, geometry.key_length)
        panel.set_ylim(offset + geometry.query_length, offset)
        if heads > 1:
            panel.set_title(f"pattern {head}", fontsize=8)
        if head + columns >= heads:
            panel.set_xlabel("key position", fontsize=8)
        if head % columns == 0:
            panel.set_ylabel("query position", fontsize=8)
    figure.suptitle(title, fontsize=9)
    patches = [
        matplotlib.patches.Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=name)
        for colour, name in zip(_COLOURS, _NAMES, strict=True)
    ]
    figure.legend(
        handles=patches[::-1], loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.savefig(path, format="png")


def _draw(panel: Any, kinds: np.ndarray, tile: tuple[int, int], offset: int, palette: Any) -> None:
    """Draws one pattern: a tile covers its tokens, the first query lies on top."""
    rows, columns = kinds.shape
    panel.imshow(
        kinds,
        cmap=palette,
        vmin=0,
        vmax=len(_COLOURS) - 1,
        interpolation="nearest",
        aspect="auto",
        extent=(0, columns * tile[1], offset + rows * tile[0], offset),
    )
    panel.locator_params(nbins=5, integer=True)
    panel.tick_params(labelsize=6, length=2)
    panel.spines[:].set(color="0.6", linewidth=0.6)
    if max(rows, columns) <= _MAX_COLUMNS:  # Else the lines would hide the tiles.
        for edge in range(1, columns):
            panel.axvline(edge * tile[1], color="white", linewidth=0.4)
        for edge in range(1, rows):
            panel.axhline(offset + edge * tile[0], color="white", linewidth=0.4)


def _squares(kinds: Kinds, most: int) -> int:
    """Returns the side of the squares of blocks that leave most of them a side."""
    return -(-max(kinds.shape[1:]) // most)


def _coarse(kinds: Kinds, size: int) -> Int[np.ndarray, "Hp m j"]:
    """Merges squares of blocks: empty or full where all are, else partial."""
    empty, partial, full = range(3)
    heads, rows, columns = kinds.shape
    padding = ((0, 0), (0, -rows % size), (0, -columns % size))
    kinds = np.pad(kinds, padding, mode="edge")
    squares = kinds.reshape(heads, kinds.shape[1] // size, size, -1, size)
    least, most = squares.min((2, 4)), squares.max((2, 4))
    return np.where(most == empty, empty, np.where(least == full, full, partial))
