"""Checkpoints of a run: state, position in the data and config as one atomic item.

The only file that knows orbax.
"""

import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import absl.logging
import jax
from orbax.checkpoint.experimental import v1 as ocp

from sparseformer_jax.checks import ConfigError

Tree = TypeVar("Tree")

policies = ocp.training.preservation_policies

# Of arrays on their way to disk, unless one is larger, where memory holds no copy of all.
_BYTES_AT_ONCE = 2**26
# Of an array that replicas write together, a part each: a smaller one is written by one of
# them, as cutting it takes longer, the first time above all, when each shape is compiled.
_BYTES_OF_A_REPLICA = 2**20


@dataclasses.dataclass(frozen=True)
class Meta:
    """What stands beside the arrays of a checkpoint.

    Attributes:
      data: state of the data iterator; every process has the same.
      corpus: fingerprint of the training text and its tokenizer.
      config: the config as `sparseformer_jax.config.to_json` writes it.
    """

    data: dict[str, Any]
    corpus: str
    config: str


class Checkpoints:
    """The checkpoints of a run; a context manager that waits for writes at its end.

    Meanwhile orbax logs nothing: its threads tell each failure once more than once.

    Args:
      workdir: of the run; they lie in its folder `checkpoints`, one folder a step.
      keep_last: how many of the newest stay; None: only read, leave everything as it is.
      keep_every: checkpoints at multiples of these steps stay for ever; 0: none.
    """

    def __init__(self, workdir: Path, *, keep_last: int | None = None, keep_every: int = 0) -> None:
        keep = [policies.LatestN(keep_last)]
        if keep_every:
            keep.append(policies.EveryNSteps(keep_every))
        self.directory = workdir.absolute() / "checkpoints"
        absl.logging.get_absl_logger().addFilter(_is_not_of_orbax)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # What a killed run left half-written, but not what a running one is writing.
                cleanup_tmp_directories=keep_last is not None,
            )
        except ValueError as error:  # of metadata that are JSON, but no object
            absl.logging.get_absl_logger().removeFilter(_is_not_of_orbax)
            raise ConfigError(
                f"{self.directory}: the metadata of a checkpoint are damaged: {_cause(error)}; "
                "move the folder of that step away"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            with self._writing():
                self._checkpointer.close()
        finally:
            absl.logging.get_absl_logger().removeFilter(_is_not_of_orbax)

    @property
    def latest_step(self) -> int | None:
        """The newest step that is completely written."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def reload(self) -> None:
        """Looks again which checkpoints there are, after some were moved."""
        self._checkpointer.reload()

    def save(self, step: int, state: Any, meta: Meta) -> None:
        """Starts writing a checkpoint; returns when the arrays may be changed."""
        if step != self.latest_step:
            items = {"state": state, "meta": dataclasses.asdict(meta)}
            with self._writing(), _saving():
                self._checkpointer.save_checkpointables_async(step, items)

    def write(self, step: int, state: Any, meta: Meta) -> None:
        """Writes a checkpoint and returns when it is on disk; no copy of the state is made.

        Raises:
          ConfigError: it could not be written, as on a full disk.
        """
        largest = max(array.nbytes for array in jax.tree.leaves(state))
        at_once = max(_BYTES_AT_ONCE, largest + 1)  # what orbax takes must be less
        context = _saving()
        context.memory.deepcopy_host_arrays = False
        context.memory.transfer_concurrent_bytes = at_once
        context.memory.write_concurrent_bytes = at_once
        items = {"state": state, "meta": dataclasses.asdict(meta)}
        with contextlib.ExitStack() as stack:
            _silence_what_is_left(stack)
            try:
                with self._writing(), context:
                    self._checkpointer.save_checkpointables(step, items)
            except ConfigError:
                stack.pop_all()  # the other arrays fail, too, until the process ends
                raise

    def wait(self) -> None:
        """Returns when all checkpoints are on disk.

        Raises:
          ConfigError: one could not be written, as on a full disk.
        """
        with self._writing():
            self._checkpointer.wait()

    def restore(self, step: int, abstract: Tree) -> Tree:
        """Returns the state of a step in the shapes, dtypes and shardings asked for.

        `abstract` may be a part of the state, a dict with fewer names.

        Raises:
          ValueError: there is no such step, or its arrays have other shapes.
        """
        self._require(step)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with self._one_line(step), context:
            path = self.directory / str(step)
            state = ocp.load_checkpointables(path, {"state": abstract})["state"]
            _require_arrays(state)
        return state

    def arrays(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the parameters and variables of a step, by name.

        Raises:
          ValueError: there is no such step.
        """
        self._require(step)
        with self._one_line(step):
            state = ocp.checkpointables_metadata(self.directory / str(step)).metadata["state"]
            if state is None:
                raise ValueError("its metadata names no arrays")
            named = {**state["params"], **state.get("variables", {})}
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in named.items()}

    def meta(self, step: int) -> Meta:
        """Returns what stands beside the arrays of a step.

        Raises:
          ValueError: there is no such step.
        """
        self._require(step)
        with self._one_line(step):
            meta = self._checkpointer.load_checkpointables(step, {"meta": None})["meta"]
        return Meta(**meta)

    @contextlib.contextmanager
    def _one_line(self, step: int) -> Iterator[None]:
        """Tells in one line why a checkpoint cannot be read."""
        with contextlib.ExitStack() as stack:
            _silence_what_is_left(stack)
            try:
                yield
            except (ValueError, KeyError, OSError) as error:
                stack.pop_all()  # reading goes on, and fails until the process ends
                warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
                raise ConfigError(
                    f"checkpoint {step} in {self.directory} is damaged or does not fit the config: "
                    f"{_cause(error)}{self._others(step)}{self._parameters_alone(step, error)}"
                ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells in one line why a checkpoint cannot be written; the ones before it stay."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"a checkpoint cannot be written to {self.directory}: {_cause(error)}; make room, "
                "then the same command resumes from the last whole one"
            ) from error

    def _others(self, step: int) -> str:
        others = [other for other in self._steps() if other != step]
        return f"; others are {others}: --step={max(others)}" if others else ""

    def _parameters_alone(self, step: int, error: BaseException) -> str:
        source = f"{self.directory.parent}:{step}"
        way = f"; a new workdir with --config.init_from={source} takes the parameters alone"
        return way if "opt_state" in _cause(error) else ""

    def _steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def _require(self, step: int) -> None:
        if step not in self._steps():
            raise ConfigError(
                f"no checkpoint of step {step} in {self.directory}; there are {self._steps()}"
            )


def _saving() -> ocp.Context:
    """How every checkpoint is written."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _BYTES_OF_A_REPLICA
    return context


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _silence_what_is_left(stack: contextlib.ExitStack) -> None:
    """Keeps quiet, until the stack ends, what orbax leaves running once an array has failed.

    Each of the others says so again: as a lost task, or to an event loop that is closed.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook

    def quiet_hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def is_other(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    logger.addFilter(is_other)
    stack.callback(logger.removeFilter, is_other)
    sys.unraisablehook = quiet_hook
    stack.callback(setattr, sys, "unraisablehook", hook)


def _require_arrays(state: Any) -> None:
    """Orbax leaves a name that the checkpoint lacks as it was asked for, without a word."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            raise KeyError(f"{jax.tree_util.keystr(path, simple=True, separator='/')} is missing")


def _cause(error: BaseException) -> str:
    """The first line of the innermost cause, where orbax keeps what differs."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
