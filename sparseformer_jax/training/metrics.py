"""Where the numbers of a run go: JSON lines always, a progress bar or plain lines, TensorBoard."""

import functools
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseformer_jax import figures, units
from sparseformer_jax.evaluation.plots import Painter, has_matplotlib
from sparseformer_jax.training.by_layer import without_layers
from sparseformer_jax.training.progress import Progress
from sparseformer_jax.training.workdir import METRICS_FILE

if TYPE_CHECKING:  # an extra, imported where it is needed
    from matplotlib.figure import Figure


class MetricWriter:
    """Writes numbers by step, after those already in the file.

    Args:
      workdir: metrics.jsonl, loss.png and TensorBoard events lie here.
      first_step: the step the run starts from.
      num_steps: the step it ends at.
      is_primary: other processes of a run on several hosts write nothing.
    """

    def __init__(self, workdir: Path, first_step: int, num_steps: int, is_primary: bool) -> None:
        self._enabled = is_primary
        if not is_primary:
            return
        self._file = (workdir / METRICS_FILE).open("a")
        self._tensorboard: Any = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir), purge_step=first_step)
        self._progress = Progress(first_step, num_steps)
        self._num_steps = num_steps
        self._painter = Painter(workdir, self._progress.line)

    def train(self, step: int, numbers: Mapping[str, float], eta: float) -> None:
        """Writes the numbers of a training step; `eta` is the time left in seconds, or nan."""
        if not self._enabled:
            return
        self._write(step, "train", numbers)
        shown = {
            "loss": f"{numbers['loss']:.4f}",
            "ppl": f"{perplexity(numbers['loss']):.2f}",
        }
        if "tokens_per_second" in numbers:
            shown["tok/s"] = f"{numbers['tokens_per_second']:.0f}"
        if "flops_per_second" in numbers:
            shown["FLOP/s"] = units.count(numbers["flops_per_second"])
        if "mfu" in numbers:
            shown["mfu"] = f"{numbers['mfu']:.1%}"
        self._progress.numbers(shown)
        pairs = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.message(f"step {step}/{self._num_steps}  {pairs}  eta {_duration(eta)}")

    @property
    def shows_pictures(self) -> bool:
        """Whether there is a TensorBoard, and what draws for it."""
        return self._enabled and self._tensorboard is not None and has_matplotlib()

    def evaluation(
        self,
        step: int,
        numbers: Mapping[str, float],
        pictures: Callable[[], Mapping[str, "Figure"]] | None = None,
    ) -> None:
        """Writes the numbers of an evaluation, and draws the run up to it.

        Args:
          step: of the evaluation.
          numbers: what it says.
          pictures: draws, by name, what TensorBoard shows of the model; None: nothing.
        """
        if not self._enabled:
            return
        self._write(step, "eval", numbers)
        pairs = "  ".join(f"{k} {value:.4g}" for k, value in without_layers(numbers).items())
        self.message(f"eval at step {step}: {pairs}")
        self._painter.draw(pictures and functools.partial(self._show, step, pictures))

    def _show(self, step: int, pictures: Callable[[], Mapping[str, "Figure"]]) -> None:
        """Draws pictures into TensorBoard."""
        for name, picture in pictures().items():
            pixels = figures.pixels(picture)
            self._tensorboard.add_image(f"pictures/{name}", pixels, step, dataformats="HWC")

    def message(self, text: str) -> None:
        """Shows a line to the user."""
        if self._enabled:
            self._progress.line(text)

    def advance(self, step: int) -> None:
        """Moves the bar to a step, whether or not its numbers are written."""
        if self._enabled:
            self._progress.advance(step)

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Shows on a terminal what the run does, as long as it does."""
        return self._progress.doing(what) if self._enabled else nullcontext()

    def close(self) -> None:
        """Ends the bar, the picture and the files."""
        if not self._enabled:
            return
        self._painter.close()
        self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file.close()

    def _write(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in numbers.items()}
        # Strict JSON has no NaN and no Infinity: null, as of a perplexity that overflows.
        finite = {name: x if math.isfinite(x) else None for name, x in named.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in finite.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)


class Clock:
    """Time a training step takes, with evaluations and checkpoints left out.

    Args:
      first_step: the step the run starts from.
    """

    def __init__(self, first_step: int) -> None:
        self._seconds, self._since = 0.0, time.perf_counter()
        self._step, self._is_first = first_step, True

    def pause(self) -> None:
        """Stops the clock."""
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def lap(self, step: int) -> float:
        """Returns the seconds a step took since the last lap; nan for the first, which compiles."""
        self.pause()
        self.resume()
        seconds = math.nan if self._is_first else self._seconds / max(1, step - self._step)
        self._seconds, self._step, self._is_first = 0.0, step, False
        return seconds


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
