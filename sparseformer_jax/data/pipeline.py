"""Batches for training, endless and resumable, and for evaluation, in order.

Row r of step s is example first_example + s * batch_size + r of the whole run, whatever the
number of processes: process p of P reads the rows from p * batch_size / P on, that many.
"""

import dataclasses
import os
from collections.abc import Iterator

import grain
import numpy as np

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.corpus import Corpus
from sparseformer_jax.data.packing import Batch, PackedExamples, padding_example


def train_iterator(
    corpus: Corpus,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_threads: int = 2,
    prefetch: int = 16,
    first_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over this process's rows of each batch.

    Its state, `get_state()`, is {"next_index": step}: `set_state` takes it in any
    process of any number of them. `close()` ends its threads.

    Args:
      corpus: The documents; every full example of them comes once in an epoch.
      seq_len: T, tokens in an example.
      batch_size: Examples in a step, over all processes.
      seed: Of the order of documents and examples, below 2**32.
      shuffle: Whether to draw an order, of the examples a new one in each epoch; else
        the stored one.
      num_threads: That make batches ahead; 0: made when asked for.
      prefetch: Batches made ahead.
      first_example: How many examples of the run, over all epochs, were drawn already.
      process_index: p, this process.
      process_count: P, of how many.

    Raises:
      ConfigError: the corpus does not fill one batch, a batch does not divide over the
        processes, or those made ahead take more than half of the machine's memory.
    """
    rows = _local_rows("train.batch_size", batch_size, process_count)
    examples = PackedExamples(corpus, seq_len, seed=seed if shuffle else None)
    _check_enough(corpus, len(examples), seq_len, batch_size)
    _check_memory(prefetch, rows * sum(array.nbytes for array in examples[0].values()))
    dataset = grain.MapDataset.source(examples)
    if shuffle:
        dataset = dataset.seed(seed).shuffle()
    # Batches of one process's rows come in turns: p of step 0, p + 1 of step 0, ...
    dataset = dataset.repeat()[first_example:].batch(rows, drop_remainder=True)
    dataset = dataset[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))


def eval_batches(
    corpus: Corpus,
    *,
    seq_len: int,
    batch_size: int,
    num_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "EvalBatches":
    """Returns this process's rows of each batch of a split, in order, each token once.

    All batches have one shape and all processes get as many: rows beyond the last
    example are padding, weights 0.

    Args:
      corpus: The documents.
      seq_len: T, tokens in an example.
      batch_size: Examples in a batch, over all processes.
      num_batches: At most so many; 0: the whole split.
      process_index: p, this process.
      process_count: P, of how many.

    Raises:
      ConfigError: a batch does not divide over the processes, or the split has not two
        tokens.
    """
    rows = _local_rows("eval.batch_size", batch_size, process_count)
    examples = PackedExamples(corpus, seq_len, pad_last=True)
    if not len(examples):
        raise ConfigError(f"data.files: split {corpus.split!r} has one token, nothing to predict")
    available = -(-len(examples) // batch_size)
    num_steps = min(num_batches, available) if num_batches else available
    starts = range(process_index * rows, num_steps * batch_size, batch_size)
    return EvalBatches(examples, starts, rows, seq_len)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Batches that are made when asked for; their number is known before.

    Attributes:
      examples: All examples of a split.
      starts: The first example of each batch.
      rows: Examples in a batch.
      seq_len: T, tokens in an example.
    """

    examples: PackedExamples
    starts: range
    rows: int
    seq_len: int

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Batch]:
        return (_stack(self.examples, start, self.rows, self.seq_len) for start in self.starts)


def _stack(examples: PackedExamples, start: int, rows: int, seq_len: int) -> Batch:
    chosen = [
        examples[i] if i < len(examples) else padding_example(seq_len)
        for i in range(start, start + rows)
    ]
    return {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}


def _local_rows(field: str, batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ConfigError(
            f"{field}={batch_size} does not divide over {process_count} processes; make"
            f" it a multiple of {process_count}"
        )
    return batch_size // process_count


def _check_enough(corpus: Corpus, num_examples: int, seq_len: int, batch_size: int) -> None:
    if num_examples < batch_size:
        raise ConfigError(
            f"train.batch_size={batch_size} with data.seq_len={seq_len} takes"
            f" {batch_size * seq_len + 1} tokens, split {corpus.split!r} has"
            f" {corpus.num_tokens}; lower one of them or add text"
        )


def _check_memory(prefetch: int, batch_bytes: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if prefetch * batch_bytes > memory / 2:
        raise ConfigError(
            f"data.prefetch={prefetch}: so many batches take {prefetch * batch_bytes / 1e9:.0f} GB,"
            f" more than half of the {memory / 1e9:.0f} GB of memory; at most"
            f" {memory // 2 // batch_bytes} fit"
        )
