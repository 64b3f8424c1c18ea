"""The training loop: restore, then evaluate, save, draw, dispatch, and read one step late."""

import contextlib
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import data, mesh, registry
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError, NonFiniteError
from sparseformer_jax.describe import costs, summary
from sparseformer_jax.evaluation import inspection, pictures
from sparseformer_jax.evaluation.perplexity import Evaluator
from sparseformer_jax.evaluation.plots import logged
from sparseformer_jax.evaluation.sums import Losses
from sparseformer_jax.training import lock
from sparseformer_jax.training.batches import DeviceBatch, TrainBatches
from sparseformer_jax.training.by_layer import ByLayer
from sparseformer_jax.training.changes import compare
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.init_from import first_state
from sparseformer_jax.training.metrics import Clock, MetricWriter
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.preemption import Preemption, Stop
from sparseformer_jax.training.restore import restore_train_state, saved_form
from sparseformer_jax.training.state import ModelDef, TrainState, abstract_state
from sparseformer_jax.training.step import make_train_step
from sparseformer_jax.training.throughput import throughput
from sparseformer_jax.training.workdir import (
    CONFIG_FILE,
    METRICS_FILE,
    History,
    leave_behind,
    make_folder,
    take_up,
    write_atomically,
)

if TYPE_CHECKING:  # of an extra
    from matplotlib.figure import Figure

# Numbers of a step that must be finite before its state is saved or used again.
FINITE = ("total_loss", "grad_norm", "update_norm", "param_norm", "variable_norm")


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    step: int | None = None,
    accept_changed_config: bool = False,
) -> None:
    """Trains a model from a validated config, resuming what the workdir holds.

    Writes checkpoints, metrics.jsonl, loss.png and config.json under `workdir`, which it locks
    against other runs. SIGTERM and Ctrl-C end it early, with everything saved; SIGTERM returns.

    Args:
      config: of the run.
      workdir: folder of the run; made if missing.
      step: the checkpoint to go on from; later ones move to `left_behind` in the workdir.
        None: the newest.
      accept_changed_config: resume though the config changes the run.

    Raises:
      ValueError: the workdir cannot be written, another process trains there, or it holds a
        run of another config and that is not accepted.
      KeyboardInterrupt: at Ctrl-C; its text says what is saved.
      NonFiniteError: a loss, gradient or parameter is not finite; the last good checkpoint
        stays.
    """
    make_folder(workdir)
    device_mesh = mesh.make_mesh(config_lib.resolve_mesh(config.mesh, jax.device_count()))
    with Preemption() as preemption:
        try:
            with contextlib.ExitStack() as stack:
                if mesh.is_primary():
                    stack.enter_context(lock.exclusive(workdir))
                stack.enter_context(jax.set_mesh(device_mesh))
                keep = config.checkpoint
                checkpoints = stack.enter_context(
                    Checkpoints(workdir, keep_last=keep.keep_last, keep_every=keep.keep_every)
                )
                run = Run(config, workdir, checkpoints, preemption)
                stack.callback(run.close)
                with preemption.interruptible():
                    run.prepare(step, accept_changed_config)
                run.loop()
        except Stop as stop:
            again = "the same command" + ("" if step is None else " without --step")
            done = f"{str(stop) or 'no step was done, nothing to save'}; {again} resumes"
            if preemption.number == signal.SIGINT:
                raise KeyboardInterrupt(f"interrupted: {done}") from None
            if mesh.is_primary():
                print(f"asked to terminate: {done}", flush=True)


class Run:
    """A run in progress: state, data, and where its numbers go."""

    state: TrainState

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        checkpoints: Checkpoints,
        preemption: Preemption,
    ) -> None:
        self.config, self.workdir, self.checkpoints = config, workdir, checkpoints
        self._preemption, self._is_profiling = preemption, False
        self._resources = contextlib.ExitStack()

    def prepare(self, step: int | None, accept_changed_config: bool) -> None:
        """Reads the text, builds the model and takes up a checkpoint, the newest if None."""
        config = self.config
        self.model_def = ModelDef(config)
        self._by_layer = ByLayer(self.model_def.abstract_model())
        # Of every token, those too whose target lies in another document.
        tokens = config.train.batch_size * config.data.seq_len
        self._flops_per_step = costs(config, self.model_def).training_flops * tokens
        tokenizer = make_tokenizer(config)
        self._corpus = data.load_corpus(config.data, "train", tokenizer)
        self._held_out = data.load_corpus(config.data, config.eval.split, tokenizer)
        self._evaluator = Evaluator(config, self.model_def, self._held_out)
        params = {name: self.model_def.params[name] for name in self.model_def.trainable()}
        num_steps = config.train.num_steps
        self._optimizer = make_optimizer(config.optimizer, num_steps, params)
        schedule = make_schedule(config.optimizer, num_steps)
        train_step = make_train_step(self.model_def, self._optimizer, schedule)
        self._train_step: Any = jax.jit(train_step, donate_argnums=0)
        self._restore(step, accept_changed_config)

    def loop(self) -> None:
        """Trains to the last step; raises Stop, with the state saved, where it is asked to end."""
        num_steps, pending = self.config.train.num_steps, None
        for step in range(self.first_step, num_steps):
            pending = self._before_step(step, pending)
            self._profile(step)
            batch = next(self._batches)
            if step == self.first_step:
                self._compile(batch)
            self.state, metrics = self._train_step(self.state, batch)
            if pending is not None:
                self._report(*pending)
            pending = (step + 1, metrics)
        if pending is not None:
            self._report(*pending)
        self._finish(num_steps)

    def close(self) -> None:
        """Ends the data threads and closes the files."""
        if self._is_profiling:
            self._end_profile()
        self._resources.close()

    def _restore(self, step: int | None, accept_changed_config: bool) -> None:
        """Takes up a checkpoint, the newest if None, or starts anew where there is none."""
        notes, examples = [summary(self.config, self.model_def)], 0
        notes += registry.notes("attention", self.config.attention)
        step = self.checkpoints.latest_step if step is None else step
        self.first_step = step or 0
        if step is None:
            key = jax.random.key(self.config.seed)
            self.state, lines = first_state(self.model_def, self._optimizer, key)
            notes += lines
        else:
            meta = self.checkpoints.meta(step)
            examples = _examples(meta)
            notes += self._accept_changes(meta, accept_changed_config)
            abstract = abstract_state(self.model_def, self._optimizer, jax.sharding.get_mesh())
            self.state = restore_train_state(self.model_def, self.checkpoints, step, abstract)
            notes += self._leave_behind(step)
            notes.append(f"resuming from step {step} in {self.workdir}")
        notes += self._open(examples)
        for note in notes:
            self._writer.message(note)

    def _open(self, examples: int) -> list[str]:
        """Starts drawing batches and writing files; returns a line on damage found there."""
        device_mesh, is_primary = jax.sharding.get_mesh(), mesh.is_primary()
        self._batches = TrainBatches(self.config, self._corpus, device_mesh, examples)
        self._resources.callback(self._batches.close)
        history = take_up(self.workdir, self.first_step) if is_primary else History()
        if is_primary:
            write_atomically(self.workdir / CONFIG_FILE, config_lib.to_json(self.config))
        num_steps = self.config.train.num_steps
        self._writer = MetricWriter(self.workdir, self.first_step, num_steps, is_primary)
        self._resources.callback(self._writer.close)
        told = history.is_evaluated, self.config.eval.plots and self._writer.shows_pictures
        told = multihost_utils.broadcast_one_to_all(np.asarray(told))
        self._is_evaluated, self._shows_pictures = map(bool, told)
        self._clock = Clock(self.first_step)
        if not history.unreadable:
            return []
        return [f"{METRICS_FILE}: dropped {history.unreadable} lines that are cut or damaged"]

    def _compile(self, batch: DeviceBatch) -> None:
        """Compiles the training step ahead, where it can be interrupted."""
        with self._preemption.interruptible(), self._writer.doing("compiling"):
            self._train_step = self._train_step.lower(self.state, batch).compile()

    def _before_step(self, step: int, pending: Any) -> Any:
        """Evaluates and saves what is due, once the step before is known to be finite.

        A run that is asked to stop is saved, and evaluated when it resumes.
        """
        stopping = self._preemption.requested(step)
        is_new = step > self.first_step
        evaluation_due = step > 0 and _is_due(step, self.config.eval.every) and not stopping
        evaluation_due = evaluation_due and (is_new or not self._is_evaluated)
        save_due = is_new and (stopping or _is_due(step, self.config.checkpoint.every))
        if pending is not None and (evaluation_due or save_due):
            self._report(*pending)
            pending = None
        self._clock.pause()
        if evaluation_due:
            stopping = not self._evaluate(step)
        if is_new and (save_due or stopping):
            self._save(step)
        if stopping:
            self._stop(step)
        self._clock.resume()
        return pending

    def _evaluate(self, step: int) -> bool:
        """Evaluates the state; gives up, and returns False, when asked to stop meanwhile."""
        with contextlib.suppress(Stop), self._preemption.interruptible():
            losses = self._evaluator.measure(self.state)
            numbers = self._evaluator.numbers(losses)
            drawn = self._pictures(losses, step) if self._shows_pictures else None
            self._writer.evaluation(step, numbers, drawn)
            return True
        return False

    def _pictures(self, losses: Losses, step: int) -> Callable[[], dict[str, "Figure"]] | None:
        """What draws the model as it is, on the primary process."""
        config = self.config
        window = inspection.first_window(config, self.model_def, self._held_out, self.state)
        if window is None:
            return None
        title = f"{config.attention.name}, step {step}, {config.eval.split}"
        return lambda: pictures.draw(losses, window, logged(self.workdir, step), title)

    def _stop(self, step: int) -> None:
        """Ends the run, once its state is on disk."""
        if step == self.first_step:
            raise Stop
        self.checkpoints.wait()
        raise Stop(f"stopped at step {step}, which is saved in {self.workdir}")

    def _report(self, step: int, metrics: dict[str, Any]) -> None:
        """Checks the numbers of a step, and writes them when due."""
        checked = {name: float(metrics[name]) for name in FINITE if name in metrics}
        if not all(map(math.isfinite, checked.values())):
            raise NonFiniteError(self._describe_failure(step, checked, metrics["nonfinite"]))
        self._writer.advance(step)
        num_steps = self.config.train.num_steps
        if step % self.config.train.log_every and step not in (num_steps, self.first_step + 1):
            return
        found = jax.device_get({k: v for k, v in metrics.items() if k != "nonfinite"})
        layers = self._by_layer.named(found.pop("layers", {}))
        numbers = {name: float(value) for name, value in found.items()} | layers
        seconds = self._clock.lap(step)
        if not math.isnan(seconds):
            numbers |= throughput(numbers["tokens"], seconds, self._flops_per_step)
        self._writer.train(step, numbers, eta=(num_steps - step) * seconds)

    def _describe_failure(
        self, step: int, checked: dict[str, float], nonfinite: dict[str, Any]
    ) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in checked.items())
        nonfinite = self.model_def.to_layers(nonfinite)
        names = [name for name, bad in jax.device_get(nonfinite).items() if bad]
        where = "each parameter, gradient and variable alone is finite"
        if names:
            where = (
                f"{len(names)} of {len(nonfinite)} parameters (or their gradients) and variables "
                "are not finite: "
                f"{', '.join(names[:4])}"
            )
        self.checkpoints.wait()
        latest = self.checkpoints.latest_step
        kept = f"the last good checkpoint is step {latest}" if latest else "there is no checkpoint"
        return (
            f"step {step}: {numbers}; {where}; {kept} in "
            f"{self.checkpoints.directory}; lower optimizer.learning_rate or set "
            "optimizer.clip_norm"
        )

    def _save(self, step: int) -> None:
        config = config_lib.to_json(self.config)
        meta = Meta({"examples": self._batches.examples}, self._corpus.fingerprint, config)
        self.checkpoints.save(step, saved_form(self.model_def, self.state), meta)

    def _finish(self, step: int) -> None:
        """Evaluates and saves the last state, and says what can be done with it."""
        if step > self.first_step or (step == self.first_step and not self._is_evaluated):
            self._evaluate(step)
        if step > self.first_step:
            self._save(step)
            self.checkpoints.wait()
        if self._preemption.number is not None:
            raise Stop(f"step {step}, the last, is saved in {self.workdir}")
        name, newest = self.workdir, max(step, self.first_step)
        done = f"done: step {newest} is saved in {name}"
        if newest > step:
            done += f", beyond train.num_steps={step}: nothing was trained"
        self._writer.message(
            f"{done}\n"
            f"  evaluate  python eval.py --workdir={name}\n"
            f"  resume    run the same command; it goes on from the last checkpoint\n"
            f'  sample    python -m sparseformer_jax.generate --workdir={name} --prompt="def "'
        )

    def _accept_changes(self, meta: Meta, accept_changed_config: bool) -> list[str]:
        """Returns a line on what differs from a checkpoint's config, or refuses it."""
        changes = compare(
            config_lib.from_json(meta.config),
            self.config,
            same_text=meta.corpus == self._corpus.fingerprint,
        )
        if changes.changing and not accept_changed_config:
            raise ConfigError(
                f"{self.workdir} holds a run with other settings: {'; '.join(changes.changing)}; "
                "take another --workdir, or pass --accept_changed_config"
            )
        lines = []
        if changes.changing:
            lines.append(f"another run from here on: {'; '.join(changes.changing)}")
        if changes.harmless:
            lines.append(f"the same run with {'; '.join(changes.harmless)}")
        return lines

    def _leave_behind(self, step: int) -> list[str]:
        """Moves what lies beyond a step away, and returns a line on it."""
        if step == self.checkpoints.latest_step:
            return []
        folder = leave_behind(self.workdir, step) if mesh.is_primary() else None
        multihost_utils.sync_global_devices("left behind")
        self.checkpoints.reload()
        return [f"what lies beyond step {step} is left behind, in {folder}"]

    def _profile(self, step: int) -> None:
        """Traces the steps of `train.profile_steps` into the workdir."""
        if not self.config.train.profile_steps:
            return
        first, last = self.config.train.profile_steps
        if step == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._is_profiling = True
        elif step == last and self._is_profiling:
            self._end_profile()

    def _end_profile(self) -> None:
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self._is_profiling = False
        self._writer.message(f"profile: {self.workdir}/profile")


def _is_due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps is due; 0: never."""
    return every > 0 and step % every == 0


def _examples(meta: Meta) -> int:
    """How many examples a checkpoint's run has drawn; old ones count accumulation pieces."""
    if "examples" in meta.data:
        return meta.data["examples"]
    train = config_lib.from_json(meta.config).train
    return meta.data["next_index"] * (train.batch_size // train.accumulation_steps)
