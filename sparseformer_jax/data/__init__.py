"""Text, tokens and batches: from files to what a training step takes."""

from sparseformer_jax.data.corpus import Corpus, load_corpus
from sparseformer_jax.data.packing import Batch, PackedExamples
from sparseformer_jax.data.pipeline import eval_batches, train_iterator
from sparseformer_jax.data.text import TextSource, make_text
from sparseformer_jax.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    make_tokenizer,
)

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "HuggingFaceTokenizer",
    "PackedExamples",
    "TextSource",
    "Tokenizer",
    "eval_batches",
    "load_corpus",
    "make_text",
    "make_tokenizer",
    "train_iterator",
]
