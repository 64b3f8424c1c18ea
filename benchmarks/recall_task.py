"""The task of `recall.py`: what a key was given is asked for again, far behind.

A row of T tokens is noise but for definitions and questions:

    noise (k3 v7) noise noise noise (k1 v2) ... noise | gap of noise | noise k1? noise k3? ...

A definition lies somewhere in each of the first P cells of C tokens; all have other keys. After
the gap every key is asked for once, in any order, and its target there is its value. Nothing else
has a weight. Answers are not in the input, so a question is of no help to another.

As in multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927), where a
definition is two tokens: `pair`. With `pair=False` one token names key and value, and what is to
be found is the token itself rather than the one after it.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from sparseformer_jax import data


@dataclasses.dataclass(frozen=True)
class Recall:
    """Sizes of the task.

    Attributes:
      seq_len: T.
      num_definitions: P of a row, and as many questions.
      cell_size: C.
      gap: tokens between the last cell and the first that may be a question.
      num_keys: of which a row has P.
      num_values: of which each definition has any.
      num_noise: tokens that say nothing.
      pair: whether a definition is two tokens.
    """

    seq_len: int = 128
    num_definitions: int = 16
    cell_size: int = 4
    gap: int = 16
    num_keys: int = 16
    num_values: int = 8
    num_noise: int = 64
    pair: bool = False

    @property
    def first_question(self) -> int:
        """The first position that may be a question."""
        return self.num_definitions * self.cell_size + self.gap

    @property
    def vocab_size(self) -> int:
        """Tokens: values, keys, noise, and one for each key with each value if not `pair`."""
        joint = 0 if self.pair else self.num_keys * self.num_values
        return self.num_values + self.num_keys + self.num_noise + joint

    def batch(self, rows: int, *seed: int) -> data.Batch:
        """Returns rows that follow from the seed alone; segment and positions are of one text."""
        return self._draw(rows, seed)[0]

    def with_distances(self, rows: int, *seed: int) -> tuple[data.Batch, Int[np.ndarray, "B T"]]:
        """Returns `batch`, and how far before each question its answer stands; 0 elsewhere."""
        return self._draw(rows, seed)

    def _draw(self, rows: int, seed: tuple[int, ...]) -> tuple[data.Batch, Int[np.ndarray, "B T"]]:
        rng = np.random.default_rng(seed)
        shape, own = (rows, self.seq_len), (rows, self.num_definitions)
        row = np.arange(rows)[:, None]
        values = rng.integers(self.num_values, size=own)
        keys = _some(rng, rows, np.arange(self.num_keys), self.num_definitions)
        starts = np.arange(self.num_definitions) * self.cell_size
        answers = starts + rng.integers(self.pair, self.cell_size, size=own)
        later = np.arange(self.first_question, self.seq_len)
        questions = _some(rng, rows, later, self.num_definitions)

        first_noise = self.num_values + self.num_keys
        inputs = rng.integers(first_noise, first_noise + self.num_noise, size=shape)
        if self.pair:
            inputs[row, answers - 1] = self.num_values + keys
            inputs[row, answers] = values
        else:
            joint = keys * self.num_values + values
            inputs[row, answers] = first_noise + self.num_noise + joint
        inputs[row, questions] = self.num_values + keys
        targets, distances = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        targets[row, questions] = values
        distances[row, questions] = questions - answers
        return {
            "inputs": inputs.astype(np.int32),
            "targets": targets,
            "positions": np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), shape),
            "segment_ids": np.ones(shape, np.int32),
            "weights": (distances > 0).astype(np.float32),
        }, distances


def _some(
    rng: np.random.Generator, rows: int, items: Int[np.ndarray, " n"], number: int
) -> Int[np.ndarray, "B number"]:
    """So many different items for each row, in any order."""
    return rng.permuted(np.tile(items, (rows, 1)), axis=1)[:, :number]
