"""One file of text, and nothing else said, trains and evaluates."""

import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax import presets
from sparseformer_jax.evaluation.perplexity import evaluate_checkpoint
from sparseformer_jax.training import loop


@pytest.mark.exhaustive
def test_one_file_trains_and_evaluates(tmp_path, capfd):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Line {i} of a short book.\n" for i in range(1000)))
    config = presets.baseline("tiny")
    config.model.num_layers, config.model.embed_dim, config.model.mlp_dim = 1, 32, 48
    config.data.files = (str(book),)
    config.data.seq_len = 64
    config.train.num_steps = 1
    config.eval.num_batches = 0
    config.optimizer.warmup_steps = 0
    config_lib.validate(config)
    loop.train(config, tmp_path / "run")
    found = [evaluate_checkpoint(config, tmp_path / "run", split=s) for s in ("validation", "test")]
    assert [result["tokens"] for result in found] == [
        pytest.approx(0.05 * book.stat().st_size, rel=0.05) for _ in range(2)
    ]
    assert capfd.readouterr().err.count("too few documents for whole ones") == 1
