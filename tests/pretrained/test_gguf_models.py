"""Models in GGUF files are those of their safetensors, by the names the gguf package has."""

import gguf
import jax
import numpy as np
import pytest

from sparseformer_jax import mesh
from sparseformer_jax.pretrained import architectures
from sparseformer_jax.pretrained.importing import (
    architecture_of,
    load_params,
    make_config,
    open_source,
)
from sparseformer_jax.training.state import ModelDef
from tests.pretrained.files import LLAMA, interleaved, write_folder, write_gguf

ARCHITECTURES = {a.gguf: a for a in architectures.known() if a.gguf}
GEMMA = {
    "model_type": "gemma3_text",
    "sliding_window": 4,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 8,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}
SETTINGS = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    "qwen3": LLAMA | {"model_type": "qwen3", "rms_norm_eps": 1e-6},
    "gemma3": LLAMA | GEMMA,
}
PREFIXED = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}


def random_tensors(architecture, config):
    """Weights by transformers' names, of the shapes that the model asks for."""
    draw = np.random.default_rng(0).standard_normal
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        params = model_def.abstract_layers(model_def.abstract(jax.sharding.get_mesh())[0])
    return {
        entry.name("hugging_face", layer): draw(entry.shape_elsewhere(params[ours].shape)).astype(
            np.float32
        )
        for ours, (entry, layer) in architecture.entries(params).items()
    }


def as_gguf(name, tensors, settings):
    """The tensors as llama.cpp's converter writes them."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, settings["num_hidden_layers"])
    heads = {"q_proj": settings["num_attention_heads"], "k_proj": settings["num_key_value_heads"]}
    found = {}
    for theirs, array in tensors.items():
        rotated = next((count for part, count in heads.items() if part in theirs), None)
        if name == "llama" and rotated:
            array = interleaved(array, rotated)
        if name == "gemma3" and theirs.endswith("norm.weight"):
            array = array + 1
        found[names.get_name(theirs, try_suffixes=(".weight", ".bias"))] = array
    return found


def loaded(path):
    source = open_source([path])
    architecture = architecture_of(source)
    config = make_config(source, architecture, source.tokenizer(), path)
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        return config, load_params(source, architecture, ModelDef(config))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_model_as_its_safetensors(name, tmp_path):
    settings = SETTINGS[name]
    folder = write_folder(tmp_path / "in", settings)
    source = open_source([folder])
    config = make_config(source, ARCHITECTURES[name], source.tokenizer(), folder)
    tensors = random_tensors(ARCHITECTURES[name], config)
    write_folder(folder, settings, tensors)

    own = {f"{name}.{key}": settings[key2] for key, key2 in PREFIXED.items() if key2 in settings}
    path = tmp_path / "a.gguf"
    write_gguf(path, as_gguf(name, tensors, settings), own, architecture=name)

    (expected, params), (found, theirs) = loaded(folder), loaded(path)
    differences = {
        key
        for key in expected.model
        if key != "norm_eps" and expected.model[key] != found.model[key]
    }
    assert not differences
    assert expected.attention == found.attention
    assert np.float32(expected.model.norm_eps) == np.float32(found.model.norm_eps)
    assert params.keys() == theirs.keys()
    for ours, array in params.items():
        # 1 + w - 1 in float32
        tolerance = 2e-7 if name == "gemma3" else 0
        np.testing.assert_allclose(theirs[ours], array, rtol=0, atol=tolerance, err_msg=ours)


def test_what_a_gemma_file_does_not_tell(tmp_path):
    """Every sixth layer is full; 27B, of 62 layers, scales queries by D/N."""
    settings = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"head_dim": 16, "intermediate_size": 8, "max_position_embeddings": 64}
    for layers, scale in ((12, 16), (62, 8)):
        own = {f"gemma3.{k}": settings[v] for k, v in PREFIXED.items() if v in settings}
        own |= {"gemma3.block_count": layers, "gemma3.attention.sliding_window": 4}
        path = tmp_path / f"{layers}.gguf"
        embedding = {"token_embd.weight": np.ones((17, 32), np.float32)}
        write_gguf(path, embedding, own, architecture="gemma3")
        source = open_source([path])
        config = make_config(source, architecture_of(source), source.tokenizer(), path)
        assert config.attention.full_layers == tuple(range(5, layers, 6))
        assert config.model.attention_scale == scale**-0.5
        assert (config.model.rope_theta, config.model.rope_local_theta) == (1e6, 1e4)
        assert config.model.tie_embeddings
