"""Windows are scored alone, whatever is beside them, and greedy ones are found."""

import dataclasses

import jax
import numpy as np
import pytest

from sparseformer_jax import registry
from sparseformer_jax.checks import NonFiniteError
from sparseformer_jax.evaluation.scoring import Scorer, Window
from tests.evaluation.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A scorer of a random model, and its logits of a sequence."""
    workdir = tmp_path_factory.mktemp("run")
    config, model = write_checkpoint(workdir)
    config.eval.batch_size = 4
    config.mesh.update({"data": 1, "fsdp": 2, "tensor": 2, "context": 2})
    compute = jax.jit(lambda tokens: model(tokens).logits)

    def logits(tokens):
        filled = np.zeros((1, 32), np.int32)
        filled[0, : len(tokens)] = tokens
        return np.asarray(compute(filled)[0, : len(tokens)], np.float64)

    return Scorer(config, workdir), logits


def test_scores_are_those_of_the_logits(scored):
    """Of windows of two widths, some of which end as greedy decoding ends them."""
    scorer, logits = scored
    draw = np.random.default_rng(0)
    windows, greedy = [], []
    for number, length in enumerate([5, 30, 9, 3, 17, 4, 12, 26, 2]):
        tokens, seen = draw.integers(0, 256, length), max(1, length - 3)
        if number % 2:
            for place in range(seen, length):
                tokens[place] = logits(tokens[:place])[-1].argmax()
        greedy.append(bool(number % 2))
        windows.append(Window(tokens, seen))
    found = scorer(windows, lambda count: 8 if count <= 8 else 32)
    assert found.is_greedy.tolist() == greedy
    for window, nll in zip(windows, found.nll, strict=True):
        log_p = jax.nn.log_softmax(logits(window.tokens))
        places = np.arange(window.seen, len(window.tokens))
        expected = -sum(float(log_p[place - 1, window.tokens[place]]) for place in places)
        np.testing.assert_allclose(nll, expected, rtol=1e-5)
    alone = scorer(windows[4:5], lambda count: 32)
    np.testing.assert_allclose(alone.nll, found.nll[4:5], rtol=1e-6)
    assert scorer([], lambda count: 8).nll.shape == (0,)


def test_parameters_that_predict_nothing_are_told(scored, monkeypatch):
    scorer, _ = scored
    params = {name: value * np.nan for name, value in scorer._state.params.items()}
    monkeypatch.setattr(scorer, "_state", dataclasses.replace(scorer._state, params=params))
    with pytest.raises(NonFiniteError, match="these parameters predict nothing"):
        scorer([Window(np.arange(5), 1)], lambda count: 8)


def test_what_fills_a_row_is_in_no_block_of_a_gate(tmp_path):
    gate = registry.method_config("attention", "seer", block_size=8, token_budget=16)
    config, _ = write_checkpoint(tmp_path, gate)
    window = Window(np.random.default_rng(0).integers(0, 256, 30), 20)
    scorer = Scorer(config, tmp_path)
    # The last block has 5 tokens, alone in its row or with others beside them.
    exact, filled = (scorer([window], lambda _, size=size: size).nll for size in (29, 32))
    np.testing.assert_allclose(filled, exact, rtol=1e-6)
