"""Packs documents into examples of one length: concatenate, then split."""

import numpy as np
from jaxtyping import Int64

from sparseformer_jax.data.corpus import Corpus

Batch = dict[str, np.ndarray]
"""Arrays [rows, T] by name; an example is one row, [T].

  inputs: int32, tokens.
  targets: int32, the token after each input.
  positions: int32, from 0 at the begin of each document or, where a document goes on
    from an earlier example, at the begin of this one.
  segment_ids: int32, 1, 2, ... for each document in the example; 0 is padding.
  weights: float32, 1 where input and target are of one document, else 0.
"""


class PackedExamples:
    """A grain source of examples: windows over all documents, one after the other.

    Of the concatenation c, example i has the inputs c[i T : i T + T] and the targets
    c[i T + 1 : i T + T + 1], so examples share no input and no target. An example costs
    O(T + log documents).

    Args:
      corpus: The documents.
      seq_len: T, tokens in an example.
      seed: Of the order of the documents, below 2**32; None: that of the corpus.
      pad_last: Whether to fill up the last example, for every token to be a target
        once; else what does not fill an example is left out.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        *,
        seed: int | None = None,
        pad_last: bool = False,
    ) -> None:
        self._tokens = corpus.tokens
        self._seq_len = seq_len
        lengths = corpus.lengths
        order = _document_order(len(lengths), seed)
        # A document without tokens would use up a segment id.
        order = order[lengths[order] > 0]
        self._offsets = corpus.offsets[order]
        self._begins = np.concatenate([[0], np.cumsum(lengths[order])])
        num_targets = max(corpus.num_tokens - 1, 0)
        self._len = -(-num_targets // seq_len) if pad_last else num_targets // seq_len

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Batch:
        start = index * self._seq_len
        stop = min(start + self._seq_len + 1, int(self._begins[-1]))
        first = np.searchsorted(self._begins, start, side="right") - 1
        last = np.searchsorted(self._begins, stop, side="left")
        begins = np.maximum(self._begins[first:last], start)
        lengths = np.minimum(self._begins[first + 1 : last + 1], stop) - begins
        offsets = self._offsets[first:last] + begins - self._begins[first:last]
        pieces = [
            self._tokens[offset : offset + length]
            for offset, length in zip(offsets, lengths, strict=True)
        ]
        tokens = np.concatenate(pieces)
        segments = np.repeat(np.arange(1, len(pieces) + 1), lengths)
        positions = np.arange(start, stop) - np.repeat(begins, lengths)
        return {
            "inputs": self._fill(tokens[:-1], np.int32),
            "targets": self._fill(tokens[1:], np.int32),
            "positions": self._fill(positions[:-1], np.int32),
            "segment_ids": self._fill(segments[:-1], np.int32),
            "weights": self._fill(segments[:-1] == segments[1:], np.float32),
        }

    def _fill(self, values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        row = np.zeros(self._seq_len, dtype)
        row[: len(values)] = values
        return row


def padding_example(seq_len: int) -> Batch:
    """Returns an example of nothing but padding, weights 0."""
    zeros = np.zeros(seq_len, np.int32)
    names = ("inputs", "targets", "positions", "segment_ids")
    return dict.fromkeys(names, zeros) | {"weights": np.zeros(seq_len, np.float32)}


def _document_order(count: int, seed: int | None) -> Int64[np.ndarray, " documents"]:
    if seed is None:
        return np.arange(count)
    # Unlike numpy.random.Generator, RandomState never changes its stream.
    return np.random.RandomState(seed).permutation(count)
