"""A picture of a run: loss, evaluation, learning rate and speed over steps.

    python -m sparseformer_jax.evaluation.plots --workdir=/tmp/quickstart

Training draws it, too, at every evaluation, where matplotlib is installed.
"""

import concurrent.futures
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparseformer_jax import figures
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.figures import Series
from sparseformer_jax.training.workdir import METRICS_FILE

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure

PICTURE_FILE = "loss.png"

_MISSING = 'pictures need matplotlib: pip install "sparseformer_jax[plots]"'


def has_matplotlib() -> bool:
    """Returns whether pictures can be drawn; does not import anything."""
    return importlib.util.find_spec("matplotlib") is not None


def read(workdir: Path) -> Series:
    """Returns steps and values of every metric of a run; what is not finite is left out.

    Raises:
      ConfigError: there are no metrics, or a line of them is damaged.
    """
    file = workdir / METRICS_FILE
    if not file.is_file():
        raise ConfigError(f"--workdir={workdir}: has no {METRICS_FILE}; train there first")
    series: Series = {}
    # A running process may be writing the last line.
    whole = (line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            numbers = {name: float(x) for name, x in record.items() if x is not None}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{file}: line {number} is damaged; remove that line") from None
        for name, value in numbers.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return series


def logged(workdir: Path, step: int) -> Series:
    """Returns what `read` does up to a step; nothing where there are no metrics.

    Raises:
      ConfigError: a line of them is damaged.
    """
    if not (workdir / METRICS_FILE).is_file():
        return {}
    found: Series = {}
    for name, (steps, values) in read(workdir).items():
        number = sum(at <= step for at in steps)
        found[name] = steps[:number], values[:number]
    return found


def draw(workdir: Path, output: Path | None = None) -> Path:
    """Draws the picture of a run and returns its path, `workdir`/loss.png unless given.

    Raises:
      ConfigError: matplotlib is missing, or there are no metrics.
    """
    if not has_matplotlib():
        raise ConfigError(_MISSING)
    path = workdir / PICTURE_FILE if output is None else output
    figures.save(figure(read(workdir), workdir.absolute().name), path)
    return path


def figure(series: Series, title: str) -> "Figure":
    """Returns the picture of a run's metrics: loss on the left, rate and speed on the right."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(figures.WIDTH, 3.2), dpi=figures.DPI, layout="constrained")
    grid = picture.add_gridspec(2, 2, width_ratios=(3, 2))
    loss = picture.add_subplot(grid[:, 0])
    rate = picture.add_subplot(grid[0, 1], sharex=loss)
    speed = picture.add_subplot(grid[1, 1], sharex=loss)
    figures.line(loss, series, "train/loss", figures.PALE, label="training")
    figures.line(loss, series, "eval/loss", figures.RED, label="evaluation", marker="o")
    loss.set(ylabel="loss (nats per token)", xlabel="step", title=title)
    if loss.lines:
        loss.legend(frameon=False)
    figures.line(rate, series, "train/learning_rate", figures.DARK)
    rate.set(ylabel="learning rate")
    rate.tick_params(labelbottom=False)
    figures.line(speed, series, "train/tokens_per_second", figures.DARK)
    speed.set(ylabel="tokens / s", xlabel="step")
    for panel in (loss, rate, speed):
        figures.tidy(panel)
    for panel in (rate, speed):
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="x", nbins=6)
        panel.ticklabel_format(axis="y", scilimits=(-2, 5))
    return picture


class Painter:
    """Draws the picture of a run in a thread of its own, out of the way of the steps.

    Args:
      workdir: of the run.
      tell: shows a line to the user where there is no picture.
    """

    def __init__(self, workdir: Path, tell: Callable[[str], None]) -> None:
        self._workdir, self._tell = workdir, tell
        self._thread = concurrent.futures.ThreadPoolExecutor(1) if has_matplotlib() else None
        self._drawing: concurrent.futures.Future[None] | None = None
        self._is_told = False

    def draw(self, then: Callable[[], None] | None = None) -> None:
        """Starts to draw what has been written so far, once the picture before is done.

        Args:
          then: called in the thread after that; None: nothing.
        """
        self._wait()

        def work() -> None:
            draw(self._workdir)
            if then is not None:
                then()

        if self._thread is not None:
            self._drawing = self._thread.submit(work)
        elif not self._is_told:
            self._tell(f"no {PICTURE_FILE}: {_MISSING}")
            self._is_told = True

    def close(self) -> None:
        """Returns when the last picture is written."""
        self._wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _wait(self) -> None:
        """A run goes on without a picture where the disk does not take it."""
        try:
            if self._drawing is not None:
                self._drawing.result()
        except OSError as error:
            self._tell(f"no {PICTURE_FILE}: {error}")
        self._drawing = None


if __name__ == "__main__":
    from sparseformer_jax import cli

    cli.plot()
