"""Pictures of routing: which clusters hold which tokens, and how large they become."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from sparseformer_jax import figures
from sparseformer_jax.figures import Series, Shown

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure

_MAX_TOKENS = 80  # that can be read side by side
_MAX_PANELS = 6  # of a page
_ARRAYS = ("head", "members", "sizes", "mates")  # of `inspect`
_NONE = "picked by no cluster"


class _Head(NamedTuple):
    """A head's numbers and options, and what `_routed_heads.inspect` says of it in one window."""

    layer: int
    head: int
    options: Any
    members: Bool[np.ndarray, "C T"]
    sizes: Integer[np.ndarray, " C"]
    mates: Integer[np.ndarray, " T"]


def draw(shown: Shown) -> Mapping[str, Sequence["Figure"]]:
    """Returns the pages of "clusters", the tokens that they hold, and "cluster_sizes"."""
    heads = [
        _Head(
            number, int(head), layer.options, *(layer.arrays[name][i] for name in _Head._fields[3:])
        )
        for number, layer in shown.layers.items()
        for i, head in enumerate(layer.arrays["head"])
    ]
    pages = [heads[i : i + _MAX_PANELS] for i in range(0, len(heads), _MAX_PANELS)]
    return {
        "clusters": [_membership(shown, page) for page in pages],
        "cluster_sizes": [_sizes(shown, heads)],
    }


def _membership(shown: Shown, heads: list[_Head]) -> "Figure":
    """A panel a layer and head: clusters over the text."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    tokens = shown.tokens[:_MAX_TOKENS]
    num_clusters = heads[0].options.num_clusters
    height = len(heads) * (0.5 + np.clip(0.09 * num_clusters, 0.7, 2)) + 0.9
    figure, panels = figures.new(len(heads), height=height, sharex=True)
    is_paper = heads[0].options.selection == "paper"
    for panel, head in zip(panels[:, 0], heads, strict=True):
        members = head.members[:, : len(tokens)]
        image = np.ones((*members.shape, 3))
        image[members] = to_rgb(figures.DARK)
        image[:, ~members.any(0)] = to_rgb(figures.RED)
        panel.imshow(image, aspect="auto", interpolation="nearest")
        title = f"layer {head.layer}, head {head.head}: {_said(head)}"
        panel.set_title(title, fontsize=8, loc="left")
        panel.set_ylabel("cluster", fontsize=8)
        panel.locator_params(axis="y", nbins=8, integer=True)
        panel.tick_params(axis="y", labelsize=7)
        panel.grid(visible=False)
        borders = np.arange(len(tokens)) - 0.5
        panel.vlines(borders, -0.5, num_clusters - 0.5, color="0.9", linewidth=0.5)
        figures.text_axis(panel, tokens)
        panel.tick_params(axis="x", labelbottom=True)
    panels[-1, 0].set_xlabel(f"the first {len(tokens)} tokens of the split", fontsize=8)
    figure.suptitle(f"{shown.title}: clusters of the tokens", fontsize=10)
    handles = [Patch(facecolor=figures.DARK, label="held by the cluster")]
    if is_paper:
        handles.append(Patch(facecolor=figures.RED, label=_NONE))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _said(head: _Head) -> str:
    """What there is to say of all tokens of the window."""
    start = f"of {head.mates.size} tokens"
    if head.options.selection == "paper":
        times = head.members.sum(0)
        none, several = np.mean(times == 0), np.mean(times > 1)
        return f"{start} {none:.0%} {_NONE}, {several:.0%} by several"
    window = head.options.window_size
    beyond = np.maximum(head.mates - (window - 1), 0).sum() / max(1, head.mates.sum())
    alone = f"{np.mean(head.mates == 0):.0%} have no mate before them"
    return f"{start} {alone}; {beyond:.0%} of the mates lie beyond the window of {window}"


def _sizes(shown: Shown, heads: list[_Head]) -> "Figure":
    """Shares of tokens over training, beside those of each head in the window."""
    options = heads[0].options
    is_paper = options.selection == "paper"
    figure, panels = figures.new(1, 3 if is_paper else 2, height=3.2)
    training, now = panels[0, :2]
    even = 1 / options.num_clusters
    colours = {"largest": figures.RED, "median": figures.DARK, "smallest": figures.PALE}
    for name, colour in colours.items():
        figures.line(training, shown.series, f"train/{name}_cluster", colour, label=name)
    training.axhline(even, color="0.4", linewidth=1, linestyle="--", label=f"even: {even:.3f}")
    training.set(xlabel="step", ylabel="share of a window's tokens", title="over training")
    for i, head in enumerate(heads):
        shares = np.sort(head.sizes)[::-1] / head.sizes.sum()
        style = {"color": figures.COLOURS[i % len(figures.COLOURS)], "marker": "o", "markersize": 3}
        label = f"layer {head.layer}, head {head.head}"
        now.plot(np.arange(1, len(shares) + 1), shares, linewidth=1, label=label, **style)
    now.axhline(even, color="0.4", linewidth=1, linestyle="--")
    now.set(xlabel="clusters by size", title=f"first {len(shown.tokens)} tokens, a line a head")
    if is_paper:
        _untaken(panels[0, 2], shown.series)
    for panel in panels[0]:
        panel.set_ylim(bottom=0)
        panel.title.set_fontsize(9)
        if panel.lines and len(panel.lines) <= 9:
            panel.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{shown.title}: sizes of clusters by nearest centroid", fontsize=10)
    return figure


def _untaken(panel: Any, series: Series) -> None:
    """The share of tokens that no cluster picked, over training."""
    figures.line(panel, series, "train/untaken", figures.RED, label="share of tokens")
    panel.set(xlabel="step", title=_NONE)
