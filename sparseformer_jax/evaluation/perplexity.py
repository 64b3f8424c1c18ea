"""Perplexity and bits per byte of held-out text."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import data, mesh, registry
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import NonFiniteError
from sparseformer_jax.evaluation import inspection, pictures, sums
from sparseformer_jax.evaluation.plots import logged
from sparseformer_jax.evaluation.sums import Losses
from sparseformer_jax.model.loss import token_losses
from sparseformer_jax.training.batches import DeviceBatch
from sparseformer_jax.training.by_layer import ByLayer
from sparseformer_jax.training.changes import evaluated_differently
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.metrics import perplexity
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef, TrainState


class Evaluator:
    """Evaluates a state on the first batches of a split, in order.

    Windows of `data.seq_len` tokens do not overlap; a token is predicted from those of
    its own document in its window.
    """

    def __init__(self, config: ConfigDict, model_def: ModelDef, corpus: data.Corpus) -> None:
        self._config, self._corpus = config, corpus
        self._step = jax.jit(make_eval_step(model_def))
        self._by_layer = ByLayer(model_def.abstract_model())

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns the `numbers` of what `measure` says of a state."""
        return self.numbers(self.measure(state))

    def measure(self, state: TrainState) -> Losses:
        """Returns losses by position and diagnostics by layer, in one pass over the windows."""
        step = functools.partial(self._step, state)
        found = sums.over_batches(self._config, self._corpus, step)
        tokens = found["tokens"]
        diagnostics = {name: x / tokens.sum() for name, x in found["diagnostics"].items()}
        return Losses(found["nll"], tokens, diagnostics)

    def numbers(self, losses: Losses) -> dict[str, float]:
        """Returns loss (nats per token), perplexity, bits_per_byte, tokens, and diagnostics.

            perplexity = exp(loss)    bits_per_byte = loss / ln 2 * tokens / bytes

        with tokens per byte counted over the whole split. Diagnostics are means over the layers
        that report them, as "density", the attended fraction, which is 1 where none does; those
        that methods want layer by layer follow, "overflow/layer_3".

        Raises:
          NonFiniteError: the loss is not a finite number.
        """
        tokens = float(losses.tokens.sum())
        loss = float(losses.nll.sum()) / tokens
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"evaluation loss is {loss} over {tokens:.0f} tokens: these parameters predict "
                "nothing; take an earlier checkpoint, or train with a lower "
                "optimizer.learning_rate"
            )
        tokens_per_byte = self._corpus.num_predicted_tokens / self._corpus.num_bytes
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
            "tokens": tokens,
            "density": 1.0,
            **{name: float(x.mean()) for name, x in losses.diagnostics.items()},
            **self._by_layer.named(self._by_layer.chosen(losses.diagnostics)),
        }


def make_eval_step(
    model_def: ModelDef,
) -> Callable[[TrainState, DeviceBatch], dict[str, Any]]:
    """Returns the function (state, batch) -> sums over windows, to be compiled.

    They are nats and tokens of each position [T], and the diagnostics of each layer [L], by name,
    that its tokens were predicted with.
    """

    def step(state: TrainState, batch: DeviceBatch) -> dict[str, Any]:
        model = model_def.model(state.params, state.variables, state.step)
        output = model.features(batch["inputs"], batch["positions"], batch["segment_ids"])
        weights = batch["weights"]
        nll = weights * token_losses(model, output.hidden, batch["targets"])
        total = jnp.sum(weights)
        found = {
            "nll": jnp.sum(nll, axis=0),
            "tokens": jnp.sum(weights, axis=0),
            "diagnostics": {name: total * x for name, x in output.diagnostics.items()},
        }
        return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), found)

    return step


def at_other_densities(
    config: ConfigDict, corpus: data.Corpus, state: TrainState
) -> list[dict[str, float]]:
    """Returns what an `Evaluator` says of a state with each options of the method's `sweep`."""
    found = []
    for options in registry.sweep("attention", config.attention, config.data.seq_len):
        other = copy.deepcopy(config)
        other.attention.update(options)
        found.append(Evaluator(other, ModelDef(other), corpus)(state))
    return found


def evaluate_checkpoint(
    config: ConfigDict,
    workdir: Path,
    *,
    step: int | None = None,
    split: str | None = None,
    plots: Path | None = None,
) -> dict[str, Any]:
    """Returns what `Evaluator` says of a checkpoint, and of what it says that.

    Beside the numbers: "step"; "split"; "text", the fingerprint of text and tokenizer; and
    "overrides", {key: "old -> new"} where the evaluation is not the run's own. With `plots`, of a
    method that offers other densities, "by_density" has those and their perplexities.

    Args:
      config: the run's, or one with other `data` and `eval` sections.
      workdir: of the run.
      step: which checkpoint; None: the newest.
      split: of the data; None: `eval.split`.
      plots: folder of pictures of the model; None: none are drawn.

    Raises:
      ValueError: there is no such checkpoint, or it does not fit the config; with `plots`,
        matplotlib is missing.
      NonFiniteError: its loss is not a finite number.
    """
    split = split or config.eval.split
    if plots is not None:
        pictures.prepare(plots)
    with jax.set_mesh(mesh.make_mesh(config_lib.resolve_mesh(config.mesh, jax.device_count()))):
        model_def = ModelDef(config)
        state = restore_state(model_def, workdir, step)
        step = int(state.step)
        with Checkpoints(workdir) as checkpoints:
            meta = checkpoints.meta(step)
        corpus = data.load_corpus(config.data, split, make_tokenizer(config))
        overrides = evaluated_differently(config_lib.from_json(meta.config), config)
        if corpus.fingerprint != meta.corpus:
            overrides["text"] = "not that of the run"
        evaluator = Evaluator(config, model_def, corpus)
        losses = evaluator.measure(state)
        results = evaluator.numbers(losses)
        window, others = None, []
        if plots is not None:
            others = at_other_densities(config, corpus, state)
            window = inspection.first_window(config, model_def, corpus, state)
    if plots is not None and window is not None:
        title = f"{config.attention.name}, step {step}, {split}"
        drawn = pictures.draw(losses, window, logged(workdir, step), title)
        if others:
            drawn["perplexity_by_density"] = pictures.sweep_figure([results, *others], title)
        pictures.save(plots, drawn)
    subject = {"step": step, "split": split, "text": corpus.fingerprint, "overrides": overrides}
    found = {**subject, **results}
    if others:
        names = ("density", "perplexity")
        found["by_density"] = [{name: point[name] for name in names} for point in others]
    return found
