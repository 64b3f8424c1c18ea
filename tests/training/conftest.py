"""A config small enough for a test, and its text."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """Documents of random words, split by their file names."""
    directory = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for split, documents in (("train", 60), ("validation", 8)):
        lines = []
        for _ in range(documents):
            length = words.randint(1, 60)
            text = " ".join("abcdefgh"[words.randrange(8)] * 3 for _ in range(length))
            lines.append(f'{{"text": "{text}"}}\n')
        (directory / f"{split}.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture
def config(text_dir) -> ConfigDict:
    """Two S2 layers on 32 tokens, with everything on that makes resuming hard."""
    config = presets.baseline("tiny")
    config.attention = registry.method_config(
        "attention", "s2", block_size=8, local_blocks=1, vert_stride=2
    )
    config.model.embed_dim = 32
    config.model.head_dim = 8
    config.model.mlp_dim = 48
    config.model.vocab_size = 264
    config.model.dropout = 0.1
    config.data.files = (str(text_dir),)
    config.data.seq_len = 32
    config.train.num_steps = 6
    config.train.batch_size = 16
    config.train.accumulation_steps = 2
    config.train.log_every = 1
    config.optimizer.warmup_steps = 2
    config.checkpoint.every = 2
    config.eval.num_batches = 2
    config.eval.plots = False
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a run, trained once."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(config, trained):
    """The config of a run of four steps on all eight devices."""
    # Not above: the warnings of its imports are filtered once a test runs.
    from sparseformer_jax.training import loop

    config.train.num_steps = 4
    config.eval.every = 2
    config.eval.plots = True
    config.train.profile_steps = (1, 3)
    if not (trained / "config.json").exists():
        loop.train(config, trained)
    return config


@pytest.fixture
def finished(run, trained, tmp_path):
    """The test's own copy of the finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def on_call(monkeypatch):
    """Sends a signal at a chosen call of a function, and returns how often it was called."""

    def arrange(owner, name, number=signal.SIGTERM, call=1):
        function, calls = getattr(owner, name), []

        def signalling(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                signal.raise_signal(number)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, signalling)
        return calls

    return arrange
