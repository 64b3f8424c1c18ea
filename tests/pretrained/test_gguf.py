"""GGUF files: every type as the gguf package reads it, and no number believed unchecked."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.gguf import TYPES, GgufFiles
from sparseformer_jax.pretrained.importing import architecture_of, make_config
from tests.pretrained.files import LLAMA, gguf_tensors, write_gguf

ALIGNMENT = 32


def string(text):
    content = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(content)) + content


def field(name, kind, value):
    return string(name) + struct.pack("<I", kind) + value


def info(name, sizes=(8, 4), kind=0, offset=0):
    numbers = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return string(name) + numbers + struct.pack("<IQ", kind, offset)


ARCHITECTURE = field("general.architecture", 8, string("llama"))


def content(fields=(ARCHITECTURE,), tensors=(), data=128, version=3, counts=None):
    """A GGUF file of these fields and tensors, each as bytes."""
    counts = counts or (len(tensors), len(fields))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*fields, *tensors])
    return header + bytes(-len(header) % ALIGNMENT) + bytes(data)


def array(kind, length, values=b""):
    return struct.pack("<IQ", kind, length) + values


BAD = {
    "magic": (b"GGML" + bytes(60), "is no GGUF file"),
    "version": (content(version=1), "the header: version 1"),
    "big_endian": (content(version=3 << 24), "the header: version 50331648"),
    "tensors": (content(counts=(2**60, 1)), "the number of tensors is 1152921504606846976"),
    "fields": (content(counts=(0, 2**60)), "the number of fields is 1152921504606846976"),
    "negative": (content(counts=(2**64 - 1, 1)), "the number of tensors is 18446744073709551615"),
    "field_name": (
        content([struct.pack("<Q", 2**60) + b"x"]),
        "the name of field 0: a length is 1152921504606846976",
    ),
    "field_type": (content([field("a", 77, b"")]), "field a: value of type 77"),
    "string": (content([field("a", 8, struct.pack("<Q", 2**60))]), "field a: a length is"),
    "text": (content([field("a", 8, string(b"\xff\xfe"))]), "field a: text that is no UTF-8"),
    "array": (content([field("a", 9, array(6, 2**60))]), "field a: its length is 1152921504606"),
    "strings": (content([field("a", 9, array(8, 2**60))]), "field a: its length is 11529215046"),
    "nested": (content([field("a", 9, array(9, 1))]), "field a: array of type 9"),
    "field_twice": (content([ARCHITECTURE] * 2), "general.architecture is there twice"),
    "alignment": (
        content([field("general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment=24 is no power of two",
    ),
    "no_alignment": (
        content([field("general.alignment", 4, struct.pack("<I", 0))]),
        "general.alignment=0",
    ),
    "sizes": (content(tensors=[info("w", (2**60, 4))]), "tensor w: 18446744073709551616 bytes"),
    "overflow": (
        content(tensors=[info("w", (2**40, 2**40))]),
        "tensor w: 4835703278458516698824704 bytes",
    ),
    "empty": (content(tensors=[info("w", (8, 0))]), "tensor w: sizes [8, 0] hold nothing"),
    "dimensions": (content(tensors=[info("w", (1,) * 5)]), "tensor w: 5 dimensions"),
    "type": (content(tensors=[info("w", kind=99)]), "tensor w: type 99 is unknown"),
    "blocks": (content(tensors=[info("w", (8, 4), kind=8)]), "tensor w: rows of 8 are no blocks"),
    "offset": (content(tensors=[info("w", offset=2**62)]), "tensor w: 128 bytes at offset"),
    "negative_offset": (
        content(tensors=[info("w", offset=2**64 - 32)]),
        "tensor w: 128 bytes at offset 18446744073709551584",
    ),
    "unaligned": (content(tensors=[info("w", (2,), offset=4)]), "tensor w: offset 4 is no multip"),
    "overlap": (
        content(tensors=[info("v"), info("w", (8,), offset=32)]),
        "tensor w overlaps v",
    ),
    "tensor_twice": (content(tensors=[info("w"), info("w", offset=128)]), "w is there twice"),
    "tensor_name": (
        content(tensors=[struct.pack("<Q", 2**40) + bytes(40)]),
        "the name of tensor 0: a length is 1099511627776",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_header(name, tmp_path):
    """One line that names the tensor or field, and no memory for what cannot be."""
    data, message = BAD[name]
    (tmp_path / "a.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as error:
            GgufFiles([tmp_path / "a.gguf"])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_cut_is_refused(tmp_path):
    data = write_gguf(tmp_path / "a.gguf").read_bytes()
    for size in (3, 20, 60, len(data) // 3, len(data) // 2, len(data) - ALIGNMENT):
        (tmp_path / "b.gguf").write_bytes(data[:size])
        with pytest.raises(ConfigError, match="cut|more than the file can hold|end beyond"):
            GgufFiles([tmp_path / "b.gguf"])


def blocks(kind, shape):
    """Random bytes of a type; any bytes are numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (*shape[:-1], shape[-1] // block * size)
    return np.random.default_rng(int(kind)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_as_gguf_dequantises_it(name, tmp_path, monkeypatch):
    kind = gguf.GGMLQuantizationType[name]
    raw = blocks(kind, (6, 512))
    if name in ("F32", "F16"):
        tensor = raw.view(np.float32 if name == "F32" else np.float16)
        path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": tensor})
    else:
        monkeypatch.setattr(  # the type of all tensors, which are given as bytes
            gguf.GGUFWriter,
            "add_tensor",
            lambda self, name, array, add=gguf.GGUFWriter.add_tensor: add(
                self, name, array, raw_dtype=kind
            ),
        )
        path = write_gguf(tmp_path / "a.gguf", {"token_embd.weight": raw})
    # Pieces of rows, and a last one that is shorter.
    monkeypatch.setattr("sparseformer_jax.pretrained.gguf._PIECE", 4 * 512)
    source = GgufFiles([path])
    assert source.shapes == {"token_embd.weight": (6, 512)}
    with np.errstate(all="ignore"):
        (theirs,) = gguf.GGUFReader(path).tensors
        expected = gguf.dequantize(theirs.data, theirs.tensor_type)
        np.testing.assert_array_equal(source.read("token_embd.weight"), expected)


def test_another_type_is_refused(tmp_path):
    kind = gguf.GGMLQuantizationType.Q2_K
    data = content(tensors=[info("w", (256,), kind=int(kind))])
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match="tensor w is Q2_K; known are F32, F16"):
        GgufFiles([tmp_path / "a.gguf"]).read("w")


def assert_whole(source):
    for name, expected in gguf_tensors().items():
        np.testing.assert_array_equal(source.read(name), expected)


@pytest.mark.parametrize("sizes", [(1000, 3000), (2,), (7000,)])
def test_plain_parts(sizes, tmp_path):
    """Cut anywhere, inside the header and inside tensors."""
    data = write_gguf(tmp_path / "a.gguf").read_bytes()
    ends = [*sizes, len(data)]
    parts = [data[start:end] for start, end in zip([0, *sizes], ends, strict=True)]
    paths = [tmp_path / f"b.gguf.part{number:02}" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    assert_whole(GgufFiles(paths))
    assert_whole(GgufFiles([paths[0]]))  # which names its siblings


def write_split(folder):
    tensors = gguf_tensors()
    names = list(tensors)
    paths = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    count = {"split.tensors.count": len(names)}
    write_gguf(paths[0], {name: tensors[name] for name in names[:7]}, count)
    write_gguf(paths[1], {name: tensors[name] for name in names[7:]}, count)
    return paths


def test_split(tmp_path):
    paths = write_split(tmp_path)
    assert_whole(GgufFiles([paths[0]]))
    assert_whole(GgufFiles(paths))


def test_split_without_a_part(tmp_path):
    paths = write_split(tmp_path)
    alone = paths[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(ConfigError, match=r"split\.tensors\.count=\d+, but the files hold 7"):
        GgufFiles([alone])
    alone.rename(paths[0])
    paths[1].unlink()
    with pytest.raises(ConfigError, match=r"m-00002-of-00002\.gguf: cannot be read"):
        GgufFiles([paths[0]])


def test_settings(tmp_path):
    fields = GgufFiles([write_gguf(tmp_path / "a.gguf")]).fields
    for name in set(LLAMA) - {"model_type", "architectures", "rms_norm_eps"}:
        assert fields.get(name, type(LLAMA[name])) == LLAMA[name]
    assert fields.get("rms_norm_eps", float) == np.float32(LLAMA["rms_norm_eps"])


def llama3_divisors(factor=8.0, theta=5e5, size=LLAMA["head_dim"]):
    """As llama.cpp's converter writes them, one by one."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, size, 2) / size):
        wave = 2 * np.pi / frequency
        if wave < 8192 / 4:
            divisors.append(1.0)
        elif wave > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_s_scaling_is_listed(tmp_path):
    divisors = llama3_divisors()
    assert {1.0, 8.0} <= set(divisors.tolist())
    tensors = gguf_tensors() | {"rope_freqs.weight": divisors}
    base = {"llama.rope.freq_base": 5e5}
    source = GgufFiles([write_gguf(tmp_path / "a.gguf", tensors, base)])
    config = make_config(source, architecture_of(source), source.tokenizer(), tmp_path / "t")
    assert (config.model.rope_scaling, config.model.rope_factor) == ("llama3", 8.0)
    assert config.model.rope_original_positions == 8192
    tensors["rope_freqs.weight"] = divisors + 1
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is no scaling as Llama 3\.1 has"):
        GgufFiles([write_gguf(tmp_path / "b.gguf", tensors, base)])


def test_scalings_are_named(tmp_path):
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = GgufFiles([write_gguf(tmp_path / "a.gguf", fields=fields)])
    config = make_config(source, architecture_of(source), source.tokenizer(), tmp_path / "t")
    assert (config.model.rope_scaling, config.model.rope_factor) == ("linear", 4.0)
    fields["llama.rope.scaling.attn_factor"] = 0.5
    with pytest.raises(ConfigError, match="attn_factor=0.5: only 1"):
        GgufFiles([write_gguf(tmp_path / "b.gguf", fields=fields)])
