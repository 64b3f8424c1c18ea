import itertools
import json
import threading

import numpy as np
import pytest

from sparseformer_jax.data import PackedExamples, eval_batches, train_iterator


@pytest.fixture
def corpus(make_corpus):
    """63 tokens, all different, in documents of 1 to 13: 12 examples of 5."""
    tokens = list(range(100, 163))
    ends = [0, 7, 8, 21, 30, 31, 44, 52, 63]
    return make_corpus([tokens[a:b] for a, b in zip(ends, ends[1:], strict=False)])


def train(corpus, **changes):
    options = {"seq_len": 5, "batch_size": 4, "seed": 0, "num_threads": 0}
    return train_iterator(corpus, **(options | changes))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], name)


def join(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_an_epoch_has_every_example_once(corpus):
    iterator = train(corpus)
    epochs = [join([next(iterator) for _ in range(3)])["inputs"] for _ in range(2)]
    examples = PackedExamples(corpus, 5, seed=0)
    expected = sorted(tuple(examples[i]["inputs"]) for i in range(12))
    for epoch in epochs:
        assert sorted(map(tuple, epoch)) == expected
        assert len(np.unique(epoch)) == 60
    assert not np.array_equal(*epochs)


def test_without_shuffling_the_order_is_the_stored_one(corpus):
    iterator = train(corpus, shuffle=False)
    for epoch in range(2):
        tokens = join([next(iterator) for _ in range(3)])["inputs"]
        np.testing.assert_array_equal(tokens.ravel(), corpus.tokens[:60], str(epoch))


def test_seeds_and_threads(corpus):
    first, again, threads, other = (
        join(list(itertools.islice(train(corpus, **changes), 7)))
        for changes in ({}, {}, {"num_threads": 3, "prefetch": 5}, {"seed": 1})
    )
    assert_equal(first, again)
    assert_equal(first, threads)
    assert not np.array_equal(first["inputs"], other["inputs"])


@pytest.mark.parametrize("process_count", [1, 3])
def test_another_batch_size_goes_on_where_the_last_one_stopped(corpus, process_count):
    """4 batches of 4, then 4 of 6, across an epoch's end, hold what 10 of 4 do, in order."""
    whole = join(list(itertools.islice(train(corpus), 10)))
    first = list(itertools.islice(train(corpus), 4))
    rest = [
        train(
            corpus,
            batch_size=6,
            first_example=16,
            process_index=p,
            process_count=process_count,
        )
        for p in range(process_count)
    ]
    rows = [next(iterator) for _ in range(4) for iterator in rest]
    assert_equal(join([*first, *rows]), whole)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 5])  # 12 examples: with and without rest
def test_resumes_at_any_step(corpus, batch_size, num_threads):
    options = {"batch_size": batch_size, "num_threads": num_threads}
    whole = train(corpus, **options)
    states, batches = [], []
    for _ in range(6):
        states.append(json.dumps(whole.get_state()))
        batches.append(next(whole))
    whole.close()
    for step, state in enumerate(states):
        assert json.loads(state) == {"next_index": step}
        resumed = train(corpus, **options)
        next(resumed)
        resumed.set_state(json.loads(state))
        for batch in batches[step:]:
            assert_equal(next(resumed), batch)
        resumed.close()


@pytest.mark.parametrize("process_count", [2, 3, 6])
@pytest.mark.parametrize("batch_size", [6, 12])
def test_processes_share_the_batch(corpus, process_count, batch_size):
    """Also where 12 examples are no multiple: 63 tokens in 3s make 20 of them."""
    options = {"seq_len": 3, "batch_size": batch_size}
    alone = train(corpus, **options)
    group = [
        train(corpus, process_index=i, process_count=process_count, **options)
        for i in range(process_count)
    ]
    for _ in range(8):
        assert_equal(join([next(member) for member in group]), next(alone))
    assert all(member.get_state() == alone.get_state() for member in group)


def test_a_state_fits_another_number_of_processes(corpus):
    alone, second = train(corpus), train(corpus, process_index=1, process_count=2)
    for _ in range(4):
        next(alone)
    second.set_state(alone.get_state())
    expected = {name: rows[2:] for name, rows in next(alone).items()}
    assert_equal(next(second), expected)


def test_close_ends_the_threads(corpus):
    before = set(threading.enumerate())
    iterator = train(corpus, num_threads=2)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_covers_the_split_in_order(corpus, process_count):
    options = {"seq_len": 5, "batch_size": 8, "process_count": process_count}
    shares = [list(eval_batches(corpus, process_index=i, **options)) for i in range(process_count)]
    assert {len(share) for share in shares} == {2}
    batches = [join(parts) for parts in zip(*shares, strict=True)]
    assert {rows.shape for batch in batches for rows in batch.values()} == {(8, 5)}
    whole = join(batches)
    padding = whole["segment_ids"] == 0
    np.testing.assert_array_equal(whole["inputs"][~padding], corpus.tokens[:-1])
    np.testing.assert_array_equal(whole["targets"][~padding], corpus.tokens[1:])
    assert whole["weights"].sum() == corpus.num_predicted_tokens
    assert not whole["weights"][padding].any()
    assert padding[13:].all()


def test_evaluation_of_some_batches(corpus):
    def evaluate(num_batches):
        return list(eval_batches(corpus, seq_len=5, batch_size=3, num_batches=num_batches))

    assert [len(evaluate(count)) for count in (0, 1, 4, 5, 9)] == [5, 1, 4, 5, 5]
    assert_equal(evaluate(1)[0], evaluate(0)[0])


def test_too_little_text(corpus, make_corpus):
    with pytest.raises(ValueError, match="batch_size=8 with data.seq_len=8 takes 65 tok"):
        train(corpus, seq_len=8, batch_size=8)
    with pytest.raises(ValueError, match="split 'test' has one token, nothing to predict"):
        eval_batches(make_corpus([[1]], split="test"), seq_len=4, batch_size=1)


def test_more_batches_ahead_than_memory_holds(corpus):
    with pytest.raises(ValueError, match="^data.prefetch=1000000000: so many batches take 400 GB"):
        train(corpus, prefetch=10**9)


def test_a_batch_divides_over_processes(corpus):
    with pytest.raises(ValueError, match="train.batch_size=4 does not divide over 3 pro"):
        train(corpus, process_count=3)
    with pytest.raises(ValueError, match="eval.batch_size=4 does not divide over 3 proc"):
        eval_batches(corpus, seq_len=5, batch_size=4, process_count=3)
