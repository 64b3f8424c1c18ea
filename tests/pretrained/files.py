"""Tiny pretrained models on disk, made without transformers."""

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def llama_tensors(config: dict = LLAMA) -> dict[str, np.ndarray]:
    """Random weights of a Llama, by transformers' names."""
    draw = np.random.default_rng(0).standard_normal
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    n, k, v = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    shapes = {"model.embed_tokens": (v, d), "model.norm": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        own = {"self_attn.q_proj": (n * h, d), "self_attn.o_proj": (d, n * h)}
        own |= {f"self_attn.{name}_proj": (k * h, d) for name in "kv"}
        own |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        own |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {f"{name}.weight": draw(shape).astype(np.float32) for name, shape in shapes.items()}


def tokenizer_json(vocab_size: int = 17) -> str:
    """A tokenizer of words "w0", "w1", .., of which the last two begin and end texts."""
    vocab = {f"w{index}": index for index in range(vocab_size - 2)}
    vocab |= {"<s>": vocab_size - 2, "</s>": vocab_size - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str()


def write_tokenizer(folder: Path, vocab_size: int = 17) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_json(vocab_size))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_folder(folder: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    """A folder as transformers writes it, of a Llama unless given."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or LLAMA))
    save_file(tensors or llama_tensors(), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    return folder


def gguf_name(name: str) -> str:
    for theirs, ours in _GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The order of rows in which llama.cpp turns neighbours, 2i and 2i+1."""
    heads = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(rows.shape)


def gguf_tensors(config: dict = LLAMA) -> dict[str, np.ndarray]:
    """The weights of `llama_tensors` as a GGUF file has them."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for name, array in llama_tensors(config).items():
        number = next((count for part, count in heads.items() if part in name), None)
        found[gguf_name(name)] = array if number is None else interleaved(array, number)
    return found


def write_gguf(
    path: Path,
    tensors: dict | None = None,
    fields: dict | None = None,
    architecture: str = "llama",
) -> Path:
    """A GGUF file of a Llama; of another architecture its fields are to be given."""
    writer = gguf.GGUFWriter(path, architecture)
    config = LLAMA
    llama = {
        "llama.context_length": config["max_position_embeddings"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*"abcdefghijklmn", "ab", "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * 15 + [3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 16,
    }
    own = (llama if architecture == "llama" else {}) | tokenizer | (fields or {})
    for name, value in own.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list) and value:
            writer.add_array(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
    for name, array in (tensors or gguf_tensors()).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
