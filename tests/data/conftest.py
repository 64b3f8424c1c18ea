import numpy as np
import pytest

from sparseformer_jax import default_config
from sparseformer_jax.data import Corpus


@pytest.fixture
def data(tmp_path):
    """The data section of a config, with a cache of its own."""
    config = default_config.get_config().data
    config.cache_dir = str(tmp_path / "cache")
    return config


@pytest.fixture
def joined():
    """Reads documents and joins their pieces, as text."""

    def join(stored):
        documents = []
        for text, begins in stored.pieces():
            if begins:
                documents.append(b"")
            documents[-1] += text
        return [document.decode() for document in documents]

    return join


@pytest.fixture
def make_corpus():
    """Builds a corpus from the tokens of its documents."""

    def build(documents, split="train"):
        lengths = [len(document) for document in documents]
        return Corpus(
            split=split,
            tokens=np.array(sum(documents, []), np.uint16),
            offsets=np.cumsum([0, *lengths])[:-1],
            lengths=np.array(lengths, np.int64),
            byte_lengths=np.array(lengths, np.int64),
            fingerprint="",
        )

    return build
