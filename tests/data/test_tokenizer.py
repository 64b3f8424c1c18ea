import random
import sys

import numpy as np
import pytest

from sparseformer_jax.data import ByteTokenizer, HuggingFaceTokenizer, make_tokenizer

TEXTS = ["", "plain\r\n", "é 日本 🙂 \x00", "".join(map(chr, range(1, 300)))]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A byte-level BPE whose file asks to cut every text to three tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<end>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello there world"] * 9, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=2)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return str(file)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == text.encode()
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


def test_bytes_decode_anything():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([256, 72, 105, 257]) == "<bos>Hi<eos>"
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"
    ids = [random.randrange(tokenizer.vocab_size) for _ in range(500)]
    assert isinstance(tokenizer.decode(ids), str)
    with pytest.raises(ValueError, match="range"):
        tokenizer.decode([258])


def test_bytes_boundary_tokens():
    assert (ByteTokenizer().bos_id, ByteTokenizer().eos_id) == (256, 257)
    without = ByteTokenizer(bos_token="", eos_token="<bos>")
    assert (without.bos_id, without.eos_id) == (None, 256)
    with pytest.raises(ValueError, match=r"^data.eos_token='</s>': the tokenizer has no"):
        ByteTokenizer(eos_token="</s>")


@pytest.mark.parametrize("text", [*TEXTS, "<bos>hello<end>"])
def test_hugging_face_round_trip(path, text):
    tokenizer = HuggingFaceTokenizer(path)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert not ids.size or ids.max() < tokenizer.vocab_size


def test_many_texts_are_encoded_as_each_alone(path):
    for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer(path)):
        found = tokenizer.encode_batch(TEXTS)
        assert [ids.tolist() for ids in found] == [tokenizer.encode(t).tolist() for t in TEXTS]
        assert {ids.dtype for ids in found} == {np.dtype(np.int32)}


def test_hugging_face_adds_and_cuts_nothing(path):
    tokenizer = HuggingFaceTokenizer(path, bos_token="<bos>", eos_token="<end>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode("").size == 0
    assert not {0, 1} & set(tokenizer.encode("hello there world, hello").tolist())


def test_fingerprints_tell_tokenizers_apart(path, tmp_path):
    other = tmp_path / "other.json"
    with open(path, encoding="utf-8") as stream:
        other.write_text(stream.read().replace("<end>", "<fin>"))
    same, changed = HuggingFaceTokenizer(path), HuggingFaceTokenizer(str(other))
    assert same.fingerprint == HuggingFaceTokenizer(path).fingerprint
    assert len({same.fingerprint, changed.fingerprint, ByteTokenizer.fingerprint}) == 3


def test_made_from_a_config(data, path):
    assert isinstance(make_tokenizer(data), ByteTokenizer)
    data.update(tokenizer=path, eos_token="")
    tokenizer = make_tokenizer(data)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, None)
    data.bos_token = "<s>"
    with pytest.raises(ValueError, match=r"^data.bos_token='<s>': the tokenizer has no"):
        make_tokenizer(data)


def test_mistakes(data, tmp_path, path, monkeypatch):
    data.tokenizer = "byte"
    with pytest.raises(ValueError, match="data.tokenizer='byte': neither 'bytes' nor"):
        make_tokenizer(data)
    data.tokenizer = str(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json' is no Hugging Face tokenizer.json"):
        make_tokenizer(data)
    data.tokenizer = path
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r'pip install "sparseformer_jax\[hf\]"$'):
        make_tokenizer(data)
