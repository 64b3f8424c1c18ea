"""safetensors are read as they say, and not at all where what they say cannot be."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.safetensors import SafetensorsFile, SafetensorsFolder
from tests.pretrained.files import LLAMA, llama_tensors, write_folder, write_tokenizer


def write(path, header, data=bytes(64), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(dtype="F32", shape=(4, 4), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_tensors_as_the_library_writes_them(dtype, tmp_path):
    arrays = {f"x{n}": np.arange(n, dtype=dtype).reshape(-1, 1) for n in (1, 3, 5)}
    save_file(arrays, tmp_path / "a.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert file.read(name).dtype == dtype
        np.testing.assert_array_equal(file.read(name), array)


BAD_HEADERS = {
    "huge": ({"w": tensor(shape=(2**60, 4))}, "w: data_offsets=[0, 64] do not hold"),
    "huge_offsets": ({"w": tensor(shape=(2**58,), offsets=(0, 2**60))}, "w: ends at byte"),
    "negative": ({"w": tensor(offsets=(-64, 0))}, "w: shape="),
    "fraction": ({"w": tensor(shape=(4.0, 4))}, "w: shape="),
    "overlap": ({"v": tensor(), "w": tensor("F32", (2,), (8, 16))}, "w overlaps v"),
    "cut": ({"w": tensor(shape=(16, 4), offsets=(0, 256))}, "w: ends at byte"),
    "wrong_size": ({"w": tensor(shape=(4, 3))}, "w: data_offsets=[0, 64] do not hold F32[4, 3]"),
    "dtype": ({"w": tensor("F99")}, "w: dtype='F99' is unknown"),
    "no_entry": ({"w": [1]}, "w: its entry"),
    "one_offset": ({"w": tensor(offsets=(0,))}, "w: its entry"),
    "no_object": ([], "its header is no JSON object"),
    "no_json": (b"{", "its header is no JSON object"),
    "no_text": (b"\xff\xfe{}", "its header is no JSON object"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(name, tmp_path):
    header, message = BAD_HEADERS[name]
    with pytest.raises(ConfigError) as error:
        SafetensorsFile(write(tmp_path / "a.safetensors", header))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [2**60, 10**9, 200])
def test_header_longer_than_the_file(length, tmp_path):
    with pytest.raises(ConfigError, match="the header is cut"):
        SafetensorsFile(write(tmp_path / "a.safetensors", {"w": tensor()}, length=length))


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_no_header(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="empty|the header is cut"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_every_cut_is_refused(tmp_path):
    whole = write_folder(tmp_path / "a")
    content = (whole / "model.safetensors").read_bytes()
    for size in (7, 8, 100, len(content) // 2, len(content) - 1):
        (whole / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(ConfigError, match="cut|ends at byte"):
            SafetensorsFolder(whole)


def test_weights_are_floating_point(tmp_path):
    file = SafetensorsFile(write(tmp_path / "a.safetensors", {"w": tensor("I32")}))
    with pytest.raises(ConfigError, match="w is I32; weights must be of F16, BF16, F32, F64"):
        file.read("w")


def split(folder):
    """Shards of a folder, as transformers writes them."""
    tensors = llama_tensors()
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[:5], sorted(tensors)[5:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    return weight_map


def test_shards(tmp_path):
    folder = write_folder(tmp_path / "a")
    index = {"metadata": {}, "weight_map": split(folder)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = SafetensorsFolder(folder)
    for name, array in llama_tensors().items():
        np.testing.assert_array_equal(source.read(name), array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": "../other.safetensors"}, "must be an object of file names"),
        ({"lm_head.weight": 3}, "must be an object of file names"),
        ({"lm_head.weight": "absent.safetensors"}, "absent.safetensors: cannot be read"),
        ({"other": "model-00001-of-00002.safetensors"}, "other is not in model-00001-of-00002"),
    ],
)
def test_bad_index(change, message, tmp_path):
    folder = write_folder(tmp_path / "a")
    index = {"weight_map": split(folder) | change}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        SafetensorsFolder(folder)


def test_pickles_are_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: is a pickle, .* as safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "bos"),
    [
        ({"bos_token": "<s>", "add_bos_token": True}, "<s>"),
        ({"bos_token": "<s>", "add_bos_token": False}, ""),
        ({"bos_token": {"content": "<s>"}}, ""),  # this tokenizer.json adds none
        ({"bos_token": None}, ""),
    ],
)
def test_tokens_around_text(settings, bos, tmp_path):
    folder = write_folder(tmp_path / "a")
    config = settings | {"eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = SafetensorsFolder(folder).tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token) == (bos, "</s>")


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        (None, None, ()),
        (16, None, ()),
        ([16, 3, 999, -1, 3], None, ("w3",)),
        ([16, 3], {"eos_token_id": [4, 16]}, ("w4",)),  # as transformers: this file decides
        (3, {}, ()),
    ],
)
def test_tokens_that_end_a_continuation(config, generation, stops, tmp_path):
    folder = write_folder(tmp_path / "a", LLAMA | {"eos_token_id": config})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = SafetensorsFolder(folder).tokenizer()
    assert (tokenizer.eos_token, tokenizer.stop_tokens) == ("</s>", stops)


def test_bad_tokenizer(tmp_path):
    folder = write_folder(tmp_path / "a")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is no JSON object"):
        SafetensorsFolder(folder).tokenizer()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is no tokenizer: "):
        SafetensorsFolder(folder).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: missing"):
        SafetensorsFolder(folder).tokenizer()
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: is no JSON object"):
        SafetensorsFolder(folder).tokenizer()
