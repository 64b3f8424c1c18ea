import numpy as np
import pytest

from sparseformer_jax.data import PackedExamples

DTYPES = {
    "inputs": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}


def random_documents(generator, count, longest):
    lengths = generator.integers(0, longest + 1, count)
    numbers = iter(range(1, int(lengths.sum()) + 1))
    return [[next(numbers) for _ in range(length)] for length in lengths]


def naive_examples(documents, seq_len):
    """All examples, the last one padded, from lists of one entry per token."""
    tokens, owners, places = [], [], []
    for owner, document in enumerate(documents):
        tokens += document
        owners += [owner] * len(document)
        places += range(len(document))
    examples = []
    for start in range(0, len(tokens) - 1, seq_len):
        example = {name: np.zeros(seq_len, dtype) for name, dtype in DTYPES.items()}
        stop = min(start + seq_len, len(tokens) - 1)
        seen = []
        for row, i in enumerate(range(start, stop)):
            if owners[i] not in seen:
                seen.append(owners[i])
                first = places[i]
            example["inputs"][row] = tokens[i]
            example["targets"][row] = tokens[i + 1]
            example["positions"][row] = places[i] - first
            example["segment_ids"][row] = len(seen)
            example["weights"][row] = owners[i] == owners[i + 1]
        examples.append(example)
    return examples


def assert_equal(found, expected):
    for name, dtype in DTYPES.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], expected[name], name)
    assert found.keys() == DTYPES.keys()


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("longest", [1, 3, 40, 100])
def test_equals_the_naive_packing(make_corpus, seq_len, longest):
    generator = np.random.default_rng(seq_len * 1000 + longest)
    documents = random_documents(generator, 12, longest)
    corpus = make_corpus(documents)
    expected = naive_examples(documents, seq_len)
    padded = PackedExamples(corpus, seq_len, pad_last=True)
    assert len(padded) == len(expected)
    for i, example in enumerate(expected):
        assert_equal(padded[i], example)
    full = PackedExamples(corpus, seq_len)
    assert len(full) == (corpus.num_tokens - 1) // seq_len
    for i in range(len(full)):
        assert_equal(full[i], expected[i])


def test_weights_count_every_predicted_token(make_corpus):
    corpus = make_corpus(random_documents(np.random.default_rng(0), 50, 30))
    examples = PackedExamples(corpus, 16, pad_last=True)
    total = sum(examples[i]["weights"].sum() for i in range(len(examples)))
    assert total == corpus.num_predicted_tokens


def test_a_seed_orders_whole_documents(make_corpus):
    documents = random_documents(np.random.default_rng(0), 40, 9)
    corpus = make_corpus(documents)

    def inputs(seed):
        examples = PackedExamples(corpus, 1, seed=seed)
        return [int(examples[i]["inputs"][0]) for i in range(len(examples))]

    shuffled = [*inputs(1), corpus.num_tokens]
    assert inputs(1) == inputs(1) != inputs(2)
    assert shuffled != sorted(shuffled)
    begins = {document[0] for document in documents if document}
    breaks = [b for a, b in zip(shuffled, shuffled[1:], strict=False) if b != a + 1]
    assert set(breaks[:-1]) <= begins  # the last break was made above


def test_the_order_of_a_seed_never_changes(make_corpus):
    corpus = make_corpus([[number, 0] for number in range(8)])
    examples = PackedExamples(corpus, 2, seed=3)
    order = [int(examples[i]["inputs"][0]) for i in range(len(examples))]
    assert order == [5, 7, 4, 6, 3, 1, 0]


@pytest.mark.parametrize("documents", [[], [[]], [[5]]])
def test_nothing_to_predict(make_corpus, documents):
    assert len(PackedExamples(make_corpus(documents), 4, pad_last=True)) == 0
