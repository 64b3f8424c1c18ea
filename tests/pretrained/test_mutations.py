"""Files with bytes changed, cut out or blown up are read, or told in one line."""

import random

import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.importing import architecture_of, make_config, open_source
from tests.pretrained.files import write_folder, write_gguf

HEADER = 2600  # bytes, which hold most of what is no weight
BLOWN_UP = (b"\xff" * 8, bytes(8), (2**60).to_bytes(8, "little"), (2**63).to_bytes(8, "little"))


def mutated(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(min(HEADER, len(content)))
        kind = draw.random()
        if kind < 0.5:
            content[place] = draw.randrange(256)
        elif kind < 0.75:
            content[place : place + 8] = draw.choice(BLOWN_UP)
        else:
            del content[place : place + draw.randrange(1, 20)]
    return bytes(content)


def mistake(path):
    """Reads all up to the weights; returns what is wrong, and raises any error but ours."""
    try:
        source = open_source([path])
        config = make_config(source, architecture_of(source), source.tokenizer(), path)
        config_lib.validate(config, num_devices=1, num_processes=1)
        for name in list(source.shapes)[:3]:
            source.read(name)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["a.gguf", "in/model.safetensors", "in/config.json"])
def test_mutations(name, tmp_path):
    write_gguf(tmp_path / "a.gguf")
    write_folder(tmp_path / "in")
    file, draw = tmp_path / name, random.Random(0)
    source = file if name == "a.gguf" else tmp_path / "in"
    content = file.read_bytes()
    assert not mistake(source)
    for _ in range(60):
        file.write_bytes(mutated(content, draw))
        assert "\n" not in mistake(source)
