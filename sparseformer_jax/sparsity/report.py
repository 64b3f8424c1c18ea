"""What the masks of a run are: how dense, whether n:m holds, how far they are from others."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from sparseformer_jax import figures
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.sparsity import nm, workdirs
from sparseformer_jax.sparsity._selection import of_all
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.sparsity.targets import KERNEL
from sparseformer_jax.training.masks import masks_of_run, split_source
from sparseformer_jax.training.restore import differences
from sparseformer_jax.training.workdir import write_atomically

if TYPE_CHECKING:  # of an extra
    from matplotlib.figure import Figure

JSON_FILE, PICTURE_FILE = "sparsity.json", "sparsity.png"

_ORDER = ("query", "key", "value", "out", "gate", "up", "down")

# Figures of a weight that stand in the picture, with their titles there.
_SHARES = {
    "density": "kept",
    "from_magnitude": "not as the largest weights",
    "from_prior": "not as the prior",
}


def measure(
    config: ConfigDict, workdir: Path, *, step: int | None = None, prior: str = ""
) -> dict[str, Any]:
    """Returns what the masks of a checkpoint are, in all and of each weight.

    Of each: `density`, the kept fraction; `holds`, whether every group keeps exactly n, None
    without a pattern; `from_magnitude` and `from_prior`, the fraction of entries at which the
    mask differs from that of the largest weights, as many, and from that of another run.

    Args:
      config: of the run.
      workdir: of the run.
      step: which checkpoint; None: the newest.
      prior: WORKDIR or WORKDIR:STEP of a run with masks of the same weights; "": none.

    Raises:
      ConfigError: a run has no masks, those of the prior are of other weights, or there is no
        such checkpoint.
    """
    workdirs.require_masks(config, workdir)
    held = workdirs.read(config, workdir, step)
    others = _masks_of(prior, held) if prior else None
    weights = []
    for name, weight, mask in held.masks():
        own = _of_weight(name, weight, mask, held.targets[name])
        if others is not None:
            own["from_prior"] = _difference(mask, others[name])
        weights.append(own)
    checked = [own["holds"] for own in weights if own["holds"] is not None]
    return {
        "step": held.step,
        "prior": prior or None,
        **{key: _mean(weights, key) for key in _SHARES if key in weights[0]},
        "holds": all(checked) if checked else None,
        "weights": weights,
    }


def table(found: Mapping[str, Any]) -> str:
    """Returns a line a layer: kept fraction, n:m, and how each projection's mask differs.

    It is that from the prior's mask where `measure` was told one.
    """
    key = "from_prior" if found["prior"] else "from_magnitude"
    grid = _Grid.of(found["weights"])
    heads = "".join(f"{path.rpartition('/')[2]:>8}" for path in grid.paths)
    lines = [
        f"entries whose mask differs from that of {found['prior'] or 'the largest weights'}, in %",
        f"{'layer':>5}{'kept %':>9}  {'n:m':<6}{heads}",
    ]
    whole = {f"{layer:>5}": list(row.values()) for layer, row in grid.rows.items()}
    for label, weights in (whole | {f"{'all':>5}": found["weights"]}).items():
        cells = ""
        for path in grid.paths:
            own = [x for x in weights if x["name"].endswith(f"/{path}/{KERNEL}")]
            cells += f"{100 * _mean(own, key):>8.2f}" if own else f"{'-':>8}"
        lines.append(
            f"{label}{100 * _mean(weights, 'density'):>9.2f}  {_verdict(weights):<6}{cells}"
        )
    return "\n".join(lines)


def write(folder: Path, found: Mapping[str, Any], title: str) -> str:
    """Writes JSON and a picture into a folder, and returns a line that says where."""
    write_atomically(folder / JSON_FILE, json.dumps(found, indent=2) + "\n")
    figures.save(figure(found, title), folder / PICTURE_FILE)
    return f"written to {folder / JSON_FILE} and {folder / PICTURE_FILE}"


def figure(found: Mapping[str, Any], title: str) -> "Figure":
    """Returns the picture: layers by projections, a panel a figure."""
    keys = [key for key in _SHARES if key in found]
    grid = _Grid.of(found["weights"])
    height = 1.6 + 0.14 * max(len(grid.rows), 8)
    picture, panels = figures.new(1, len(keys), height=height, sharey=True)
    picture.suptitle(title, fontsize=10)
    for panel, key in zip(panels[0], keys, strict=True):
        shares = 100 * grid.array(key)
        top = max(1.0, np.nanmax(shares))
        image = panel.imshow(shares, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        panel.set_title(f"{_SHARES[key]} (%)", fontsize=9)
        names = [path.rpartition("/")[2] for path in grid.paths]
        panel.set_xticks(range(len(names)), names, rotation=45, fontsize=8)
        panel.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
        panel.tick_params(length=0)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        picture.colorbar(image, pad=0.02).ax.tick_params(labelsize=7)
    panels[0][0].set_ylabel("layer")
    return picture


class _Grid(NamedTuple):
    """Figures of weights by layer and projection.

    Attributes:
      paths: of projections, in the order in which a layer computes them.
      rows: of each layer its weights by path.
    """

    paths: list[str]
    rows: dict[int, dict[str, Mapping[str, Any]]]

    @classmethod
    def of(cls, weights: Sequence[Mapping[str, Any]]) -> "_Grid":
        """Returns the grid of all weights."""
        rows: dict[int, dict[str, Mapping[str, Any]]] = {}
        for own in weights:
            _, layer, path = own["name"].removesuffix(f"/{KERNEL}").split("/", 2)
            rows.setdefault(int(layer), {})[path] = own
        paths = dict.fromkeys(path for row in rows.values() for path in row)
        return cls(sorted(paths, key=_place), rows)

    def array(self, key: str) -> Float[np.ndarray, "L P"]:
        """Returns one figure of each, not a number where a layer has no such projection."""
        missing = {key: np.nan}
        rows = self.rows.values()
        return np.array([[row.get(path, missing)[key] for path in self.paths] for row in rows])


def _place(path: str) -> tuple[int, str]:
    name = path.rpartition("/")[2]
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), path)


def _of_weight(
    name: str, weight: Float[Array, "*S"], mask: Bool[Array, "*S"], target: Target
) -> dict[str, Any]:
    pattern, size = target.pattern, jnp.abs(weight)
    if pattern is None:
        flat = of_all(size.reshape(-1, 1), mask.size - int(mask.sum()))
        holds, largest = None, flat.reshape(mask.shape)
    else:
        holds = nm.holds(np.asarray(mask), pattern, target.axis)
        largest = nm.mask(size, pattern.n, pattern.m, target.axis)
    return {
        "name": name,
        "shape": list(mask.shape),
        "pattern": None if pattern is None else str(pattern),
        "density": float(jnp.mean(mask)),
        "holds": holds,
        "from_magnitude": _difference(mask, largest),
    }


def _difference(mask: Bool[Array, "*S"], other: Any) -> float:
    return float(np.mean(np.asarray(mask) != np.asarray(other)))


def _mean(weights: Sequence[Mapping[str, Any]], key: str) -> float:
    sizes = [math.prod(own["shape"]) for own in weights]
    return float(np.average([own[key] for own in weights], weights=sizes))


def _verdict(weights: Sequence[Mapping[str, Any]]) -> str:
    """The pattern of weights that keep it; "BROKEN" if one does not."""
    if any(own["holds"] is False for own in weights):
        return "BROKEN"
    patterns = {own["pattern"] or "-" for own in weights}
    return patterns.pop() if len(patterns) == 1 else "mixed"


def _masks_of(source: str, held: workdirs.Checkpoint) -> dict[str, Any]:
    """The masks of another run, which must have them of the same weights."""
    try:
        with workdirs.one_device():
            masks = masks_of_run(*split_source(source))
    except ValueError as error:
        raise ConfigError(f"--prior={source}: {error}") from None
    wanted = {name: jax.ShapeDtypeStruct(held.params[name].shape, bool) for name in held.targets}
    if wrong := differences({name: x for name, x in masks.items() if name in wanted}, wanted):
        raise ConfigError(f"--prior={source}: does not fit the run: {wrong}")
    return masks
