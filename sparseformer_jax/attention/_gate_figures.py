"""Pictures of gates: what they say of blocks beside what is true, and how well, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sparseformer_jax import figures
from sparseformer_jax.figures import Series, Shown

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure

_MAX_HEADS, _MAX_LAYERS = 4, 6  # of a page
_ORANGE = figures.COLOURS[1]
# Of the past blocks that a gate says are the highest quarter of a row.
_NUMBERS = {
    "recall": "recall of the true quarter",
    "mass": "target's share in the quarter",
    "kl": "KL, nats",
}


class _Layer(NamedTuple):
    """A layer's number and options, and what `_distillation.told` says of it in one window."""

    number: int
    options: Any
    gate: Float[np.ndarray, "n M J"]
    target: Float[np.ndarray, "n M J"]
    past: Bool[np.ndarray, "M J"]


def draw(shown: Shown) -> Mapping[str, Sequence["Figure"]]:
    """Returns the pages of "blocks", a map a head, and "recall", numbers of layers.

    Nothing is drawn of a window without past blocks.
    """
    layers = [
        _Layer(number, layer.options, *(layer.arrays[name] for name in _Layer._fields[2:]))
        for number, layer in shown.layers.items()
    ]
    if not any(layer.past.any() for layer in layers):
        return {}
    return {"blocks": list(_maps(shown, layers)), "recall": [_recall(shown, layers)]}


def highest_quarter(
    shares: Float[np.ndarray, "n M J"], past: Bool[np.ndarray, "M J"]
) -> Bool[np.ndarray, "n M J"]:
    """Returns the past blocks of the highest shares in each row, a quarter of them, rounded up."""
    order = np.argsort(np.where(past, -shares, np.inf), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1)
    return past & (rank < -(-past.sum(-1, keepdims=True) // 4))


def numbers(layer: _Layer) -> dict[str, Float[np.ndarray, " n"]]:
    """Returns `_NUMBERS` and "true_mass" of each head, means over the rows with past blocks."""
    gate, target = layer.gate.astype(np.float64), layer.target.astype(np.float64)
    found, true = (highest_quarter(x, layer.past) for x in (gate, target))
    rows = layer.past.any(-1)
    is_some = target > 0
    tiny = np.finfo(np.float32).tiny  # what a gate's softmax may round to 0
    ratio = np.where(is_some, target, 1) / np.where(is_some, np.maximum(gate, tiny), 1)
    terms = {
        "recall": (found & true).sum(-1) / np.maximum(true.sum(-1), 1),
        "mass": (target * found).sum(-1),
        "true_mass": (target * true).sum(-1),
        "kl": (target * np.log(ratio)).sum(-1),
    }
    return {name: x[:, rows].mean(-1) for name, x in terms.items()}


def _maps(shown: Shown, layers: list[_Layer]) -> Iterator["Figure"]:
    """Pages with a row a layer and two columns a head, as many heads on one as on the next."""
    heads = len(layers[0].gate)
    pages = -(-heads // _MAX_HEADS)
    for first in range(0, len(layers), _MAX_LAYERS):
        for page in range(pages):
            columns = range(page * heads // pages, (page + 1) * heads // pages)
            yield _page(shown, layers[first : first + _MAX_LAYERS], columns)


def _page(shown: Shown, layers: list[_Layer], heads: range) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    side = min(1.6, (figures.WIDTH - 0.6) / (2 * len(heads)))  # inches of a panel
    inches = max(6.5, 2 * side * len(heads) + 0.6), (side + 0.1) * len(layers) + 1.4
    figure = Figure(figsize=inches, dpi=figures.DPI, layout="constrained")
    panels = figure.subplots(len(layers), 2 * len(heads), squeeze=False, sharex=True, sharey=True)
    for row, layer in zip(panels, layers, strict=True):
        for head, (left, right) in zip(heads, row.reshape(-1, 2), strict=True):
            _draw_map(left, layer.gate[head], layer, len(shown.tokens))
            _draw_map(right, layer.target[head], layer, len(shown.tokens))
        row[0].set_ylabel(f"layer {layer.number}\nquery position", fontsize=8)
    for head, (left, right) in zip(heads, panels[0].reshape(-1, 2), strict=True):
        left.set_title(f"head {head}, gate", fontsize=8)
        right.set_title(f"head {head}, true", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("key position", fontsize=7)
    options = layers[0].options
    size, kind = options.block_size, "query" if options.gates == "prefill" else "key/value"
    figure.suptitle(
        f"{shown.title}: blocks of {size} keys by {kind} head\nfirst {len(shown.tokens)} tokens of "
        "the split; shade: root of the share over the row's largest",
        fontsize=9,
    )
    handles = [
        Patch(facecolor=figures.DARK, label="the row's largest share"),
        Patch(facecolor=_ORANGE, label="of the highest quarter of past blocks"),
        Patch(facecolor="white", edgecolor="0.6", linewidth=0.5, label="none"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw_map(panel: Any, shares: Float[np.ndarray, "M J"], layer: _Layer, num_tokens: int) -> None:
    """The first row lies on top; the last block may stick out."""
    from matplotlib.colors import to_rgb

    tiny = np.finfo(np.float32).tiny
    shade = np.sqrt(shares / np.maximum(shares.max(-1, keepdims=True), tiny))[..., None]
    is_high = highest_quarter(shares[None], layer.past)[0, ..., None]
    colours = np.where(is_high, to_rgb(_ORANGE), to_rgb(figures.DARK))
    num_rows, num_blocks = shares.shape
    end = num_blocks * layer.options.block_size
    bottom = num_rows if num_rows == num_tokens else end
    image = 1 - shade * (1 - colours)
    panel.imshow(image, interpolation="nearest", extent=(0, end, bottom, 0), aspect="auto")
    panel.set(xlim=(0, num_tokens), ylim=(num_tokens, 0), box_aspect=1)
    panel.locator_params(nbins=3, integer=True)
    panel.tick_params(labelsize=6, length=2)
    panel.spines[:].set(color="0.6", linewidth=0.6)


def _recall(shown: Shown, layers: list[_Layer]) -> "Figure":
    """Numbers of the window by layer, a dot a head, above what training logged of layers."""
    found = [numbers(layer) for layer in layers]
    place = [layer.number for layer in layers]
    has_log = any(f"train/kl/layer_{number}" in shown.series for number in place)
    width = min(0.7, len(place) / 8)
    figure, panels = figures.new(1 + has_log, len(_NUMBERS), height=5.6 if has_log else 3.2)
    for column, (name, label) in enumerate(_NUMBERS.items()):
        panel = panels[0, column]
        means = [of_heads[name].mean() for of_heads in found]
        panel.bar(place, means, width=width, color=figures.PALE, label="mean of heads")
        dots = [(number, x) for number, own in zip(place, found, strict=True) for x in own[name]]
        size = 6 if len(place) <= 12 else 2
        style = {"s": size, "color": figures.DARK, "zorder": 3, "label": "a head"}
        panel.scatter(*zip(*dots, strict=True), **style)
        if name == "mass":
            best = [of_heads["true_mass"].mean() for of_heads in found]
            ends = (np.array(place) - width / 2, np.array(place) + width / 2)
            panel.hlines(best, *ends, color=figures.RED, label="of the true quarter")
        panel.set(xlabel="layer", ylim=(0, 1 if name == "recall" else None))
        panel.set_title(label, fontsize=9)
        panel.xaxis.get_major_locator().set_params(integer=True)
        if has_log:
            _over_training(panels[1, column], shown.series, name, place)
    title = f"{shown.title}: gates by layer, first {len(shown.tokens)} tokens of the split"
    if has_log:
        title += "\nbelow: over training, of what gates would choose in its windows"
    figure.suptitle(title, fontsize=9)
    handles = [x for panel in panels[:, 1] for x in panel.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def _over_training(panel: Any, series: Series, name: str, layers: Sequence[int]) -> None:
    """A line a layer, from pale to dark, and their mean."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    shades = LinearSegmentedColormap.from_list("layers", [figures.PALE, figures.DARK])
    for i, number in enumerate(layers):
        colour = to_hex(shades(i / max(1, len(layers) - 1)))
        label = f"layer {number}" if number in (layers[0], layers[-1]) else None
        figures.line(panel, series, f"train/{name}/layer_{number}", colour, label=label)
    figures.line(panel, series, f"train/{name}", figures.RED, label="mean of layers")
    panel.set(xlabel="step")
    panel.set_title({"kl": "KL, nats"}.get(name, name), fontsize=9)
    panel.set_ylim(0, None if name == "kl" else 1)
