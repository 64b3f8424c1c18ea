"""Which tokens may be drawn, and how often each is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.generation.choice import Choice


def drawn(choice, logits, number=4000):
    keys = jax.random.split(jax.random.key(0), number)
    tokens = jax.jit(jax.vmap(lambda key: choice(jnp.asarray(logits), key)))(keys)
    return np.bincount(tokens, minlength=len(logits)) / number


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


LOGITS = np.log(np.asarray([0.05, 0.4, 0.1, 0.3, 0.15]))


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (Choice(1.0), [0, 1, 2, 3, 4]),
        (Choice(0.5), [0, 1, 2, 3, 4]),
        (Choice(1.0, top_k=2), [1, 3]),
        (Choice(1.0, top_p=0.72), [1, 3, 4]),
        (Choice(1.0, top_p=0.01), [1]),
        (Choice(2.0, top_k=3, top_p=0.7), [1, 3]),
        (Choice(0.0), [1]),
        (Choice(1.0, top_k=9), [0, 1, 2, 3, 4]),
    ],
)
def test_draws_are_of_the_kept_tokens_by_their_probability(choice, kept):
    expected = np.zeros(5)
    expected[kept] = softmax(LOGITS[kept] / (choice.temperature or 1))
    # Four standard deviations of a count of 4000.
    np.testing.assert_allclose(drawn(choice, LOGITS), expected, atol=4 * 0.5 / np.sqrt(4000))
    assert set(np.flatnonzero(drawn(choice, LOGITS, 200))) <= set(kept)


def test_equally_likely_tokens_are_kept_together():
    assert np.flatnonzero(drawn(Choice(1.0, top_k=1), [1.0, 0.0, 1.0])).tolist() == [0, 2]


def test_large_logits_do_not_overflow():
    assert drawn(Choice(1e-3), [3e38, 0.0, -3e38], 8).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "--temperature=nan: must be from 0.001 to 1000, or 0"),
        ({"temperature": float("inf")}, "--temperature=inf: must be"),
        ({"temperature": 1e-40}, "--temperature=1e-40: must be"),
        ({"top_k": -1}, "--top_k=-1: must be"),
        ({"top_p": 0.0}, "--top_p=0.0: must be"),
        ({"top_p": 1.5}, "--top_p=1.5: must be"),
        ({"temperature": 0.0, "top_k": 5}, "--top_k=5: --temperature=0 takes the likeliest"),
        ({"temperature": 0.0, "top_p": 0.5}, "--top_p=0.5: --temperature=0 takes"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ConfigError) as caught:
        Choice(**options)
    assert str(caught.value).startswith(message)
