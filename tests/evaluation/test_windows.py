"""Perplexity in windows against a computation by hand, for any batch size and mesh."""

import gzip
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparseformer_jax import config as config_lib
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation import texts, windows
from sparseformer_jax.evaluation.windows import Windows
from tests.evaluation.checkpoints import write_checkpoint

TEXT = "the quick brown fox, żółć! " * 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a random model, its config, and the model."""
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "text.txt").write_text(TEXT)
    return workdir, *write_checkpoint(workdir)


def by_hand(model, pieces, start=(), seen=None):
    """Loss of all but the first token of each piece, or the first `seen`, one after another."""
    nll, count = 0.0, 0
    compute = jax.jit(lambda tokens: model(tokens).logits)
    for piece, known in zip(pieces, seen or [1] * len(pieces), strict=True):
        tokens = np.array([*start, *piece])
        logits = np.asarray(compute(tokens[None])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for position in range(len(start) + known - 1, len(tokens) - 1):
            nll -= log_p[position, tokens[position + 1]]
            count += 1
    return nll / count, count


def in_pieces(ids, size):
    """What predicts anything of a sequence that is cut."""
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [piece for piece in pieces if len(piece) > 1]


class SmallTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    texts = (TEXT[:60], TEXT[7:40], TEXT[9:100])

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"held_out": enumerate({"text": text} for text in self.texts)}

    def _generate_examples(self):
        raise NotImplementedError


def evaluate(run, size, number=0, bos="none", stride=0, **eval_config):
    workdir, config, _ = run
    config = config_lib.from_json(config_lib.to_json(config))
    config.eval.update(eval_config)
    cut = Windows(size, number, bos, stride)
    return windows.evaluate(config, workdir, {"text.txt": [TEXT]}, cut)


@pytest.mark.parametrize("bos", ["none", "window", "text"])
def test_windows_of_a_text(run, bos):
    """The last is shorter, and the last batch is not full."""
    ids = list(TEXT.encode())
    stream = [256, *ids] if bos == "text" else ids
    pieces = [stream[start : start + 24] for start in range(0, len(stream), 24)]
    expected, count = by_hand(run[2], pieces, [256] if bos == "window" else [])
    found = evaluate(run, 24, bos=bos)
    assert (found["tokens"], found["windows"], found["step"]) == (count, len(pieces), 3)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], np.exp(expected), rtol=1e-5)


def test_the_first_windows(run):
    ids = list(TEXT.encode())
    found = evaluate(run, 24, number=2, batch_size=8)
    expected, count = by_hand(run[2], [ids[:24], ids[24:48]])
    assert found["tokens"] == count == 46
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_overlapping_windows_predict_every_token_once(run):
    bos, stride = "window", 10
    ids = list(TEXT.encode())
    pieces, seen = [ids[:24]], [1]
    for start in range(stride, len(ids), stride):
        if len(ids) > start + 24 - stride:  # else the window before has it all
            pieces.append(ids[start : start + 24])
            seen.append(24 - stride)
    expected, count = by_hand(run[2], pieces, [256], seen)
    found = evaluate(run, 24, bos=bos, stride=stride)
    assert found["tokens"] == count == len(ids) - 1
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    # Of a byte-level model a token is a byte.
    np.testing.assert_allclose(found["bits_per_byte"], expected / np.log(2), rtol=1e-5)


def test_documents_are_cut_alone_or_joined(run):
    """Those of several texts have figures of their own."""
    workdir, config, model = run
    documents = {"one": [TEXT[:50], "", "a"], "two": [TEXT[:30]]}
    found = windows.evaluate(config, workdir, documents, Windows(24))
    # ż and ó take two bytes each.
    pieces = [p for text in (TEXT[:50], TEXT[:30]) for p in in_pieces(text.encode(), 24)]
    expected, count = by_hand(model, pieces)
    assert (found["tokens"], found["documents"]) == (count, 4)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert found["texts"].keys() == {"one", "two"}
    for name, text in {"one": TEXT[:50], "two": TEXT[:30]}.items():
        own, count = by_hand(model, in_pieces(text.encode(), 24))
        assert found["texts"][name]["tokens"] == count
        np.testing.assert_allclose(found["texts"][name]["loss"], own, rtol=1e-5)
    joined = windows.evaluate(config, workdir, documents, Windows(24, join="\n"))
    whole = "\n".join([TEXT[:50], "", "a", TEXT[:30]])
    expected, count = by_hand(model, in_pieces(whole.encode(), 24))
    assert (joined["tokens"], joined["documents"], joined["text"]) == (count, 1, "one,two")
    np.testing.assert_allclose(joined["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(8, {"fsdp": 8}), (4, {"data": 2, "tensor": 2, "context": 2})],
    ids=["fsdp", "all"],
)
def test_neither_batch_nor_mesh_changes_the_figures(run, batch_size, sizes):
    """Of windows that neither the batch nor the sequence axis divides."""
    workdir, config, _ = run
    cut = Windows(23, bos="window", stride=20)
    expected = windows.evaluate(config, workdir, {"a": [TEXT]}, cut)
    other = config_lib.from_json(config_lib.to_json(config))
    other.eval.batch_size = batch_size
    other.mesh.update({"data": 1} | sizes)
    found = windows.evaluate(other, workdir, {"a": [TEXT]}, cut)
    assert found["tokens"] == expected["tokens"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)


def test_command(run, capsys, tmp_path):
    workdir, config, _ = run
    file = tmp_path / "text.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps({"story": TEXT}).encode()))
    cut, field = "--window=24", "--config.data.text_field=story"
    windows.main(["windows", f"--workdir={workdir}", f"--files={file}", cut, field])
    out, err = capsys.readouterr()
    found = json.loads(out)
    np.testing.assert_allclose(found["loss"], evaluate(run, 24)["loss"])
    assert (found["step"], found["text"], found["windows"]) == (3, str(file), 7)
    header, row = err.splitlines()
    assert header.split() == "text documents windows tokens loss perplexity bits per byte".split()
    assert row.split()[1:4] == ["1", "7", str(found["tokens"])]
    assert row.split()[4] == f"{found['loss']:.4f}"

    def mistake(*arguments):
        with pytest.raises(SystemExit) as stopped:
            windows.main(["windows", f"--workdir={workdir}", *arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert mistake("--files=absent.txt") == "error: --files=absent.txt: there is no such file\n"
    assert mistake("--files=a.txt", "--split=test").startswith("error: --split=test: goes without")
    assert mistake().startswith("error: --files=...: missing")


def test_the_split_of_a_data_set(run, tmp_path, capsys):
    """Each example is a document."""
    SmallTexts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    capsys.readouterr()  # what tfds says
    arguments = ["--split=held_out", "--window=24", "--config.data.tfds_name=small_texts"]
    arguments += [f"--config.data.tfds_data_dir={tmp_path}", f"--config.data.cache_dir={tmp_path}"]
    windows.main(["windows", f"--workdir={run[0]}", *arguments])
    found = json.loads(capsys.readouterr().out)
    pieces = [piece for text in SmallTexts.texts for piece in in_pieces(text.encode(), 24)]
    expected, count = by_hand(run[2], pieces)
    assert (found["documents"], found["tokens"], found["text"]) == (3, count, "held_out")
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    windows.main(["windows", f"--workdir={run[0]}", *arguments, r"--join=\n"])
    joined = json.loads(capsys.readouterr().out)
    assert (joined["documents"], joined["join"]) == (1, "\n")
    assert (
        joined["tokens"] == sum(len(t.encode()) for t in SmallTexts.texts) + 2 - joined["windows"]
    )


def test_mistakes(run, tmp_path):
    workdir, config, _ = run
    with pytest.raises(ConfigError, match="--window=1: predicts nothing"):
        Windows(1)
    with pytest.raises(ConfigError, match="--stride=25: leaves out tokens .*--window=24"):
        Windows(24, stride=25)
    with pytest.raises(ConfigError, match="--bos='windw': not one of .*did you mean window"):
        Windows(24, 0, "windw")
    with pytest.raises(ConfigError, match=r"a\.txt: too short"):
        windows.evaluate(config, workdir, {"a.txt": ["a"]}, Windows(24))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"b\.txt' is not utf-8 text"):
        texts.of_files(config.data, [tmp_path / "b.txt"])
    other = config_lib.from_json(config_lib.to_json(config))
    other.data.bos_token = ""
    with pytest.raises(ConfigError, match="names no token; set --config.data.bos_token"):
        windows.evaluate(other, workdir, {"a": [TEXT]}, Windows(24, 0, "text"))
    other.model.position = "learned"
    with pytest.raises(ConfigError, match="--window=4096: the model has 2048 positions"):
        windows.evaluate(other, workdir, {"a": [TEXT]}, Windows(4096))
