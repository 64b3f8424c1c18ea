"""Combiner (Ren et al. 2021, arXiv 2107.05768): full attention through summaries of spans.

    python train.py --config=configs/combiner.py:tiny --workdir=/tmp/combiner

tiny: 0.1 M parameters, seconds on a CPU, for tests.
small: the dense baseline's 124 M, 8k tokens, fixed spans of 128.
paper: the Wiki-40B language model, 111 M with a vocabulary of 32k pieces: 12 layers, 2k
  tokens, spans of 128, 125k steps of 128 sequences; the paper reports a perplexity of 17.70
  with fixed spans, and 17.56 with `--config.attention.variant=axial_row`. A TPU pod slice or
  8 GPUs; needs `--config.data.tfds_name=wiki40b/en` installed, and a tokenizer of 32k pieces.
pretrained: any imported model, which `init_from` names, with this attention in place of its own.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns Combiner at a size: "tiny", "small", "paper" or "pretrained"."""
    config = presets.baseline(size)
    options = {"span_size": 16} if size == "tiny" else {}
    config.attention = registry.method_config("attention", "combiner", **options)
    if size == "paper":
        _wiki40b(config)
    return config


def _wiki40b(config: ConfigDict) -> None:
    """The released settings: GELU, LayerNorm, learned positions, tied output, AdamW."""
    model = config.model
    model.vocab_size = 32_000
    model.num_layers = 12
    model.embed_dim = 768
    model.num_heads = 12
    model.num_kv_heads = 12
    model.head_dim = 64
    model.mlp_dim = 3072
    model.position = "learned"
    model.max_positions = 2048
    model.norm = "layernorm"
    model.mlp = "gelu"
    model.mlp_bias = True
    model.qkv_bias = True
    model.out_bias = True
    config.data.seq_len = 2048
    config.train.batch_size = 128
    config.train.num_steps = 125_000
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.final_fraction = 0.0
