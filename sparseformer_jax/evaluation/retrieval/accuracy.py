"""Accuracy of a checkpoint by task, length and depth.

Answers are greedy continuations, and an answer's score is the fraction of what was asked for that
it contains (RULER, Hsieh et al. 2024, arXiv 2404.06654).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sparseformer_jax import figures
from sparseformer_jax.checks import ConfigError, check_choice
from sparseformer_jax.evaluation import results
from sparseformer_jax.evaluation.retrieval import pictures
from sparseformer_jax.evaluation.retrieval.tasks import TASKS, Questions, make_questions, score
from sparseformer_jax.generation.choice import Choice
from sparseformer_jax.generation.sampling import Sampler

RESULTS_FILE = "retrieval.json"

_DIGITS = 4  # of accuracies in the file


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
      lengths: of prompt and answer together, in tokens.
      tasks: names, of `tasks.TASKS`.
      num_depths: how many places of a haystack, evenly from its start to its end; 1: its middle.
      num_examples: at each depth, or of each length where a task has no depths.
      seed: of the examples.

    Raises:
      ConfigError: a task is unknown, one of a list stands there twice, or a number is below 1.
    """

    lengths: Sequence[int]
    tasks: Sequence[str] = TASKS
    num_depths: int = 5
    num_examples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            check_choice("--tasks", task, TASKS)
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            if len(set(values)) < len(values):
                listed = ",".join(map(str, values))
                raise ConfigError(f"--{name}={listed}: names one twice; leave it out")
        numbers = {"lengths": min(self.lengths), "depths": self.num_depths}
        for name, value in {**numbers, "examples": self.num_examples}.items():
            if value < 1:
                raise ConfigError(f"--{name}={value}: must be at least 1")

    @property
    def depths(self) -> list[float]:
        """Fractions of a haystack, 0 to 1."""
        return np.linspace(0, 1, self.num_depths).tolist() if self.num_depths > 1 else [0.5]


def parse_lengths(text: str) -> list[int]:
    """Returns the numbers of a list, as 256,512.

    Raises:
      ConfigError: it has anything else.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--lengths={text}: must be numbers of tokens, as 256,512") from None


def evaluate_checkpoint(
    config: ConfigDict, workdir: Path, settings: Settings, *, step: int | None = None
) -> dict[str, Any]:
    """Returns how a checkpoint answers, and of what it says that.

    "accuracy" holds of every task and length the mean score, and of tasks with depths those of
    each depth, "by_depth".

    Args:
      config: the run's.
      workdir: of the run.
      settings: what is asked.
      step: which checkpoint; None: the newest.

    Raises:
      ConfigError: a length is beyond `data.seq_len`, or too small for its task; there is no such
        checkpoint, or it does not fit the config.
    """
    longest, window = max(settings.lengths), config.data.seq_len
    if longest > window:
        raise ConfigError(
            f"--lengths={longest}: the model's window is {window} tokens; ask for less, or pass "
            f"--config.data.seq_len={longest}"
        )
    sampler = Sampler(config, workdir, step=step, choice=Choice(0.0))
    return {
        "step": sampler.step,
        "attention": config.attention.name,
        "window": window,
        "tokenizer": sampler.tokenizer.fingerprint,
        "seed": settings.seed,
        "examples": settings.num_examples,
        "accuracy": evaluate(sampler, settings, batch_size=config.eval.batch_size),
    }


def evaluate(sampler: Sampler, settings: Settings, *, batch_size: int) -> list[dict[str, Any]]:
    """Returns a record of every task and length; a terminal shows how far it is.

    Args:
      sampler: of a model, choosing the likeliest tokens.
      settings: what is asked.
      batch_size: prompts that are continued together at most.

    Raises:
      ConfigError: a length is too small for its task, or the tokenizer loses the answers.
    """
    # `disable=None`: only on a terminal.
    show = {"unit": "prompt", "disable": None, "leave": False}
    pairs = list(itertools.product(settings.tasks, settings.lengths))
    # All are written first: a length that does not do is told at once.
    asked = [
        make_questions(
            task,
            length,
            depths=settings.depths,
            num_examples=settings.num_examples,
            seed=settings.seed,
            sampler=sampler,
        )
        for task, length in tqdm(pairs, "writing prompts", **show | {"unit": "task"})
    ]
    records = []
    with tqdm(total=sum(len(questions.items) for questions in asked), **show) as bar:
        for questions in asked:
            bar.set_description(f"{questions.task}, {questions.length} tokens")
            records.append(_record(questions, _scores(sampler, questions, batch_size, bar)))
    return records


def _scores(sampler: Sampler, questions: Questions, batch_size: int, bar: tqdm) -> list[float]:
    """The score of each question."""
    items = questions.items
    size = min(batch_size, len(items))
    scores = []
    for first in range(0, len(items), size):
        batch = items[first : first + size]
        # One program for all: what fills the last batch up is a prompt that nobody reads.
        prompts = [question.prompt for question in batch]
        prompts += prompts[:1] * (size - len(batch))
        texts = sampler.continuations(prompts, questions.answer_tokens)
        answered = zip(batch, texts, strict=False)
        scores += [score(text, question.answers) for question, text in answered]
        bar.update(len(batch))
    return scores


def _record(questions: Questions, scores: Sequence[float]) -> dict[str, Any]:
    by_depth: dict[float, list[float]] = {}
    for question, value in zip(questions.items, scores, strict=True):
        if question.depth is not None:
            by_depth.setdefault(question.depth, []).append(value)
    means = [{"depth": depth, "accuracy": _mean(values)} for depth, values in by_depth.items()]
    return {
        "task": questions.task,
        "length": questions.length,
        "answer_tokens": questions.answer_tokens,
        "accuracy": _mean(scores),
        **({"by_depth": means} if means else {}),
    }


def _mean(scores: Sequence[float]) -> float:
    return round(sum(scores) / len(scores), _DIGITS)


def table(found: Mapping[str, Any]) -> str:
    """Returns the accuracies as text: a row a task, a column a length."""
    records = found["accuracy"]
    lengths = sorted({record["length"] for record in records})
    cells = {(record["task"], record["length"]): record["accuracy"] for record in records}
    tasks = dict.fromkeys(record["task"] for record in records)
    width = max(len("accuracy"), *map(len, tasks))
    rows = [("accuracy", *(str(length) for length in lengths))]
    rows += [(task, *(f"{cells[task, length]:.2f}" for length in lengths)) for task in tasks]
    return "\n".join(
        "".join([name.ljust(width), *(cell.rjust(8) for cell in row)]) for name, *row in rows
    )


def write(folder: Path, found: Mapping[str, Any]) -> str:
    """Writes the file and a picture of each task, and returns a line that says where.

    Pictures of tasks that an earlier call left in the folder go.
    """
    drawn = pictures.draw(found)
    for task in TASKS:
        path = folder / f"{task}.png"
        if task in drawn:
            figures.save(drawn[task], path)
        else:
            path.unlink(missing_ok=True)
    return f"{results.write(folder / RESULTS_FILE, found)}, with a picture of each task"
