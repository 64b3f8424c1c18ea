"""Pictures of retrieval: accuracy by length and depth, or by length alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseformer_jax import figures

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure

_MAX_CELLS = 12  # of a row or column, with a number in each


def draw(found: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Returns a picture of each task of what `accuracy.evaluate_checkpoint` found, by name."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(found["accuracy"], key=lambda record: record["length"]):
        by_task.setdefault(record["task"], []).append(record)
    pages = {}
    for task, records in by_task.items():
        title = f"{task.replace('_', ' ')}: {found['attention']}, step {found['step']}"
        page = heat_map if "by_depth" in records[0] else line
        pages[task] = page(records, title)
    return pages


def heat_map(records: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Returns accuracy as the shade of each depth, downwards, and length, to the right.

    Args:
      records: of a task, ascending by length.
      title: of the picture.
    """
    lengths = [record["length"] for record in records]
    depths = [place["depth"] for place in records[0]["by_depth"]]
    accuracy = np.array([[place["accuracy"] for place in x["by_depth"]] for x in records]).T
    figure, panels = figures.new(1, height=1.2 + 0.4 * min(max(len(depths), 3), _MAX_CELLS))
    panel = panels[0, 0]
    is_coarse = max(accuracy.shape) <= _MAX_CELLS
    panel.grid(visible=False)
    image = panel.pcolormesh(
        accuracy, cmap=_shades(), vmin=0, vmax=1, edgecolors="white", linewidth=float(is_coarse)
    )
    panel.invert_yaxis()
    places, labels = _ticks([str(length) for length in lengths])
    panel.set_xticks(np.add(places, 0.5), labels)
    places, labels = _ticks([f"{depth:.0%}" for depth in depths])
    panel.set_yticks(np.add(places, 0.5), labels)
    panel.set(xlabel="length (tokens)", ylabel="depth in the text", title=title)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    if is_coarse:
        for (row, column), value in np.ndenumerate(accuracy):
            colour = "white" if value > 0.5 else "black"
            text = {"color": colour, "ha": "center", "va": "center", "fontsize": 9}
            panel.text(column + 0.5, row + 0.5, f"{value:.2f}", **text)
    figure.colorbar(image, label="accuracy", pad=0.02)
    return figure


def line(records: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Returns accuracy over length.

    Args:
      records: of a task, ascending by length.
      title: of the picture.
    """
    figure, panels = figures.new(1, height=2.8)
    panel = panels[0, 0]
    accuracy = [record["accuracy"] for record in records]
    panel.plot(range(len(records)), accuracy, color=figures.DARK, marker="o", clip_on=False)
    panel.margins(x=0.06)
    panel.set_xticks(*_ticks([str(record["length"]) for record in records]))
    panel.set(xlabel="length (tokens)", ylabel="accuracy", title=title, ylim=(0, 1))
    return figure


def _shades() -> Any:
    """From nothing right, nearly white, to all right, dark."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("accuracy", ["0.94", figures.PALE, figures.DARK])


def _ticks(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places and labels of at most `_MAX_CELLS` of them, in equal steps."""
    places = list(range(0, len(labels), -(-len(labels) // _MAX_CELLS)))
    return places, [labels[place] for place in places]
