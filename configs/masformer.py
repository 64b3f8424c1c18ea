"""MASFormer (Zhang et al. 2023, arXiv 2310.12442): few full layers, short spans above.

    python train.py --config=configs/masformer.py:tiny --workdir=/tmp/masformer

tiny: 0.1 M parameters, seconds on a CPU, for tests.
small: the dense baseline's 124 M, 8k tokens, 2 of 12 layers full, blocks of 1024.
paper: the blocks of GPT-Neo 1.3 B at 8k tokens, 4 of 24 layers full, blocks of 1024: 27 % of
  dense attention's pairs.
pretrained: any imported model, which `init_from` names, with this attention in place of its own.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns MASFormer at a size: "tiny", "small", "paper" or "pretrained"."""
    config = presets.baseline(size)
    options = {
        "tiny": {"span_size": 32, "num_full_layers": 1},
        "small": {"span_size": 1024, "num_full_layers": 2},
        "paper": {"span_size": 1024, "num_full_layers": 4},
        "pretrained": {},
    }[size]
    config.attention = registry.method_config("attention", "masformer", **options)
    if size == "paper":
        _gpt_neo(config.model)
    return config


def _gpt_neo(model: ConfigDict) -> None:
    """GPT-Neo: learned positions, LayerNorm, unscaled logits, biases but on q, k and v."""
    model.position = "learned"
    model.max_positions = 8192
    model.norm = "layernorm"
    model.norm_eps = 1e-5
    model.mlp = "gelu_tanh"
    model.mlp_dim = 8192
    model.mlp_bias = True
    model.out_bias = True
    model.attention_scale = 1.0
