"""The training loop: restore, then evaluate, save, draw, dispatch, and read one step late."""

import contextlib
import math
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import data, mesh
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError, NonFiniteError
from sparseformer_jax.describe import summary
from sparseformer_jax.evaluation.perplexity import Evaluator
from sparseformer_jax.training.batches import TrainBatches
from sparseformer_jax.training.changes import compare
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from sparseformer_jax.training.metrics import Clock, MetricWriter
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.preemption import Preemption
from sparseformer_jax.training.state import ModelDef, TrainState, abstract_state, init_state
from sparseformer_jax.training.step import make_train_step
from sparseformer_jax.training.workdir import CONFIG_FILE, leave_behind, write_atomically

# Numbers of a step that must be finite before its state is saved or used again.
FINITE = ("total_loss", "grad_norm", "update_norm", "param_norm")


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    step: int | None = None,
    accept_changed_config: bool = False,
) -> None:
    """Trains a model from a validated config, resuming what the workdir holds.

    Writes checkpoints, metrics.jsonl and config.json under `workdir`. Ends early, with
    everything saved, when the process is asked to terminate.

    Args:
      config: of the run.
      workdir: folder of the run; made if missing.
      step: the checkpoint to go on from; later ones move to `left_behind` in the workdir.
        None: the newest.
      accept_changed_config: resume though the config changes the run.

    Raises:
      ValueError: the workdir holds a run of another config and that is not accepted.
      NonFiniteError: a loss, gradient or parameter is not finite; the last good checkpoint
        stays.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    device_mesh = mesh.make_mesh(config_lib.resolve_mesh(config.mesh, jax.device_count()))
    with jax.set_mesh(device_mesh), contextlib.ExitStack() as stack:
        keep = config.checkpoint
        checkpoints = stack.enter_context(
            Checkpoints(workdir, keep_last=keep.keep_last, keep_every=keep.keep_every)
        )
        run = Run(config, workdir, checkpoints, device_mesh)
        run.restore(step, accept_changed_config)
        if mesh.is_primary():
            write_atomically(workdir / CONFIG_FILE, config_lib.to_json(config))
        stack.callback(run.close)
        run.loop(stack.enter_context(Preemption()))


class Run:
    """A run in progress: state, data, and where its numbers go."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        checkpoints: Checkpoints,
        device_mesh: jax.sharding.Mesh,
    ) -> None:
        self.config, self.workdir, self.checkpoints = config, workdir, checkpoints
        self._mesh, self._is_profiling = device_mesh, False
        self.model_def = ModelDef(config)
        tokenizer = make_tokenizer(config)
        self._corpus = data.load_corpus(config.data, "train", tokenizer)
        held_out = data.load_corpus(config.data, config.eval.split, tokenizer)
        self._evaluator = Evaluator(config, self.model_def, held_out)
        params = {name: self.model_def.params[name] for name in self.model_def.trainable()}
        num_steps = config.train.num_steps
        self._optimizer = make_optimizer(config.optimizer, num_steps, params)
        schedule = make_schedule(config.optimizer, num_steps)
        step = make_train_step(self.model_def, self._optimizer, schedule)
        self._train_step = jax.jit(step, donate_argnums=0)

    def restore(self, step: int | None, accept_changed_config: bool) -> None:
        """Takes up a checkpoint, the newest if None, or starts anew where there is none."""
        notes, examples = [summary(self.config, self.model_def)], 0
        step = self.checkpoints.latest_step if step is None else step
        self.first_step = step or 0
        if step is None:
            key = jax.random.key(self.config.seed)
            self.state = jax.jit(lambda: init_state(self.model_def, self._optimizer, key))()
        else:
            meta = self.checkpoints.meta(step)
            examples = _examples(meta)
            notes += self._accept_changes(meta, accept_changed_config)
            abstract = abstract_state(self.model_def, self._optimizer, self._mesh)
            self.state = TrainState(**self.checkpoints.restore(step, vars(abstract)))
            notes += self._leave_behind(step)
            notes.append(f"resuming from step {step} in {self.workdir}")
        self._batches = TrainBatches(self.config, self._corpus, self._mesh, examples)
        self._writer = MetricWriter(
            self.workdir, self.first_step, self.config.train.num_steps, mesh.is_primary()
        )
        self._clock = Clock(self.first_step)
        for note in notes:
            self._writer.message(note)

    def loop(self, preemption: Preemption) -> None:
        """Trains to the last step, or until the process is asked to end."""
        num_steps, pending = self.config.train.num_steps, None
        for step in range(self.first_step, num_steps):
            stopping = preemption.requested(step)
            if step > self.first_step:
                pending = self._before_step(step, pending, stopping)
            if stopping:
                self._writer.message(
                    f"asked to terminate: stopped at step {step}; the same command resumes"
                )
                return
            self._profile(step)
            self.state, metrics = self._train_step(self.state, next(self._batches))
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
        self._batches.close()
        self._writer.close()

    def _before_step(self, step: int, pending: Any, stopping: bool) -> Any:
        """Evaluates and saves what is due, once the step before is known to be finite."""
        evaluation_due = _is_due(step, self.config.eval.every)
        save_due = stopping or _is_due(step, self.config.checkpoint.every)
        if not (evaluation_due or save_due):
            return pending
        self._report(*pending)
        self._clock.pause()
        if evaluation_due:
            self._writer.evaluation(step, self._evaluator(self.state))
        if save_due:
            self._save(step)
        self._clock.resume()
        return None

    def _report(self, step: int, metrics: dict[str, Any]) -> None:
        """Checks the numbers of a step, and writes them when due."""
        checked = {name: float(metrics[name]) for name in FINITE}
        if not all(map(math.isfinite, checked.values())):
            raise NonFiniteError(self._describe_failure(step, checked, metrics["nonfinite"]))
        num_steps = self.config.train.num_steps
        if step % self.config.train.log_every and step not in (num_steps, self.first_step + 1):
            return
        numbers = {k: float(v) for k, v in jax.device_get(metrics).items() if k != "nonfinite"}
        seconds = self._clock.lap(step)
        if not math.isnan(seconds):
            numbers["tokens_per_second"] = numbers["tokens"] / seconds
        self._writer.train(step, numbers, eta=(num_steps - step) * seconds)

    def _describe_failure(
        self, step: int, checked: dict[str, float], nonfinite: dict[str, Any]
    ) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in checked.items())
        names = [name for name, bad in jax.device_get(nonfinite).items() if bad]
        where = (
            f"{len(names)} of {len(nonfinite)} parameters or their gradients are not finite: "
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
        self.checkpoints.save(step, vars(self.state), meta)

    def _finish(self, step: int) -> None:
        """Evaluates and saves the last state, and says what can be done with it."""
        if step > self.first_step:
            self._writer.evaluation(step, self._evaluator(self.state))
            self._save(step)
            self.checkpoints.wait()
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
