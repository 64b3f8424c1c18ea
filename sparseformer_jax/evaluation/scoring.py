"""How a checkpoint predicts windows of tokens: log-likelihoods, and whether it would write them."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float64
from ml_collections import ConfigDict
from tqdm import tqdm

from sparseformer_jax import config as config_lib
from sparseformer_jax import data, mesh
from sparseformer_jax.checks import NonFiniteError
from sparseformer_jax.model.loss import token_scores
from sparseformer_jax.training.batches import DeviceBatch, place
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef, TrainState


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens that a model sees at once, and predicts but for the first `seen`, at least one."""

    tokens: np.ndarray
    seen: int

    @property
    def num_inputs(self) -> int:
        """How many of them the model reads: all but the last."""
        return len(self.tokens) - 1


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says of windows.

    Attributes:
      nll: of each window, the sum over its predicted tokens of -ln p, in nats.
      is_greedy: whether each of those is the likeliest token in its place.
    """

    nll: Float64[np.ndarray, " windows"]
    is_greedy: Bool[np.ndarray, " windows"]


class Scorer:
    """The model of a checkpoint, over the mesh of its config.

    Args:
      config: of the run; `eval.batch_size` windows are computed at a time.
      workdir: of the run.
      step: which checkpoint; None: the newest.

    Attributes:
      step: of the checkpoint.

    Raises:
      ConfigError: there is no such checkpoint, or it does not fit the config.
    """

    def __init__(self, config: ConfigDict, workdir: Path, step: int | None = None) -> None:
        self._batch_size = config.eval.batch_size
        sizes = config_lib.resolve_mesh(config.mesh, jax.device_count())
        self._mesh = mesh.make_mesh(sizes)
        with jax.set_mesh(self._mesh):
            model_def = ModelDef(config)
            self._state = restore_state(model_def, workdir, step)
            self._compute = jax.jit(_make_step(model_def))
        self.step = int(self._state.step)

    def __call__(self, windows: Sequence[Window], width: Callable[[int], int]) -> Scores:
        """Returns what the model says of each window; a terminal shows how far it is.

        Windows of one width are computed together, so nothing but rounding depends on which
        others there are.

        Args:
          windows: in any order.
          width: of the row that holds so many inputs, at least that; of few values, for each
            of which a program is compiled. Rows are filled up for `mesh.context` to divide them.

        Raises:
          NonFiniteError: a loss is not a finite number.
        """
        context = self._mesh.shape["context"]
        widths = [-(-width(window.num_inputs) // context) * context for window in windows]
        # The widest first: memory that is too small is told at once.
        order = sorted(range(len(windows)), key=widths.__getitem__, reverse=True)
        scores = Scores(np.zeros(len(windows)), np.ones(len(windows), bool))
        hidden = not (mesh.is_primary() and sys.stderr.isatty())
        show = {"unit": "window", "leave": False, "disable": hidden}
        running: list[tuple[list[int], tuple[jax.Array, jax.Array]]] = []
        with (
            jax.set_mesh(self._mesh),
            tqdm(total=len(order), desc="evaluate", **show) as bar,
        ):
            sharding = jax.NamedSharding(self._mesh, mesh.spec("batch", "seq"))
            for size, same in itertools.groupby(order, widths.__getitem__):
                for numbers in _cut(list(same), self._batch_size):
                    batch = self._batch([windows[number] for number in numbers], size)
                    running.append((numbers, self._compute(self._state, place(batch, sharding))))
                    # Read one batch late, so that the device never waits for the host.
                    for done in running[:-1]:
                        bar.update(_read(scores, *done))
                    del running[:-1]
            for done in running:
                bar.update(_read(scores, *done))
        if not np.isfinite(scores.nll).all():
            raise NonFiniteError(
                "the loss of a window is not a finite number: these parameters predict nothing; "
                "take an earlier checkpoint with --step"
            )
        return scores

    def _batch(self, windows: Sequence[Window], width: int) -> data.Batch:
        """This process's rows of a batch; what fills it has weight 0."""
        rows = self._batch_size // jax.process_count()
        tokens = np.zeros((rows, width + 1), np.int32)
        firsts, ends = np.zeros((2, rows, 1), np.int32)
        own = windows[jax.process_index() * rows :][:rows]
        for row, window in enumerate(own):
            tokens[row, : len(window.tokens)] = window.tokens
            firsts[row], ends[row] = window.seen - 1, window.num_inputs
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width)).copy()
        return {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": positions,
            # What fills a row is another document: gates pool blocks of tokens.
            "segment_ids": (positions >= ends).astype(np.int32),
            "weights": ((positions >= firsts) & (positions < ends)).astype(np.float32),
        }


def _make_step(
    model_def: ModelDef,
) -> Callable[[TrainState, DeviceBatch], tuple[Float[Array, "B T"], Bool[Array, " B"]]]:
    """A function (state, batch) -> nats of each predicted token, and of rows if all are likeliest.

    The first is 0 of other tokens.
    """

    def step(
        state: TrainState, batch: DeviceBatch
    ) -> tuple[Float[Array, "B T"], Bool[Array, " B"]]:
        model = model_def.model(state.params, state.variables, state.step)
        output = model.features(batch["inputs"], batch["positions"], batch["segment_ids"])
        nll, is_likeliest = token_scores(model, output.hidden, batch["targets"])
        is_predicted = batch["weights"] > 0
        found = jnp.where(is_predicted, nll, 0), jnp.all(is_likeliest | ~is_predicted, axis=-1)
        return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), found)

    return step


def _cut(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def _read(scores: Scores, numbers: list[int], found: tuple[jax.Array, jax.Array]) -> int:
    """Takes the rows of a batch from the devices; returns how many."""
    nll, is_greedy = jax.device_get(found)
    # In float64: long windows add up many numbers.
    scores.nll[numbers] = nll[: len(numbers)].sum(axis=-1, dtype=np.float64)
    scores.is_greedy[numbers] = is_greedy[: len(numbers)]
    return len(numbers)
