"""What pictures share: their size and style, and what a method's own are drawn of."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure

WIDTH, DPI = 8, 110  # inches, and dots in each: README's width
COLOURS = ("#0b3c5d", "#e07a1f", "#2a9d8f", "#d1495b")
PALE, DARK, RED = "#8ecae6", "#0b3c5d", "#d1495b"

# Metrics of a run by name: steps and values.
Series = dict[str, tuple[list[int], list[float]]]

_VISIBLE = {" ": "␣", "\n": "↵", "\t": "→"}


class ShownLayer(NamedTuple):
    """A layer's options, and what its `Attention.inspect` says of one window, by name."""

    options: Any
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shown:
    """What `Attention.figures` draws of.

    Attributes:
      title: which method, step and split.
      tokens: the text of each token of the window, T of them.
      layers: of the class by number, those of which `inspect` says anything.
      series: what the run has logged until then; empty where its log is missing.
    """

    title: str
    tokens: Sequence[str]
    layers: Mapping[int, ShownLayer]
    series: Series


def new(rows: int, columns: int = 1, *, height: float, **options: Any) -> tuple["Figure", Any]:
    """Returns a figure of README's width, `height` inches high, and its panels, an array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in panels.flat:
        tidy(panel)
    return figure, panels


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG; whoever looks at the file meanwhile sees the one before."""
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def pixels(figure: "Figure") -> UInt8[np.ndarray, "Y X 3"]:
    """Returns what a figure looks like."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def tidy(panel: Any) -> None:
    """Gives a panel a pale grid, and no frame but its axes."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)


def line(panel: Any, series: Series, name: str, colour: str, **options: Any) -> None:
    """Draws a metric over steps; nothing if there is none of that name."""
    if name in series:
        panel.plot(*series[name], color=colour, linewidth=1.5, markersize=4, **options)


def text_axis(panel: Any, tokens: Sequence[str]) -> None:
    """Writes tokens below a panel, at 0, 1, 2 and so on; white space is made visible.

    Where most are single characters, longer ones, as marks of documents, become "◆". What the
    font lacks becomes "·".
    """
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("monospace"))

    def drawn(character: str) -> str:
        character = _VISIBLE.get(character, character)
        is_there = character.isprintable() and font.get_char_index(ord(character))
        return character if is_there else "·"

    labels = ["".join(map(drawn, token)) for token in tokens]
    is_text = np.median([len(label) for label in labels]) <= 1
    if is_text:
        labels = [label if len(label) <= 1 else "◆" for label in labels]
    style = {"fontsize": 7, "family": "monospace", "parse_math": False}
    panel.set_xticks(range(len(labels)), labels, rotation=0 if is_text else 90, **style)
    panel.tick_params(axis="x", length=0, pad=2)
