"""S2-Attention (Lin et al. 2024, arXiv 2407.17678): local bands and stripes by head.

    python train.py --config=configs/s2.py:tiny --workdir=/tmp/s2
    python train.py --config=configs/s2.py:pretrained --config.init_from=/tmp/model \
        --workdir=/tmp/sparse

tiny: 0.1 M parameters, seconds on a CPU, for tests.
small: the dense baseline's 124 M, 8k tokens, blocks of 64, 4 local, every 16th a stripe.
paper: Phi-3-small's 7.4 B: 32 query and 8 key/value heads, 1024 local tokens, stride 8,
  phases by query head shifted by one, every second layer dense; 8k tokens, a TPU pod slice.
pretrained: any imported model, which `init_from` names, with this attention in place of its own.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns S2-Attention at a size: "tiny", "small", "paper" or "pretrained"."""
    config = presets.baseline(size)
    options = {
        "tiny": {"block_size": 16, "local_blocks": 2, "vert_stride": 3},
        "small": {},
        "paper": {
            "local_blocks": 16,
            "vert_stride": 8,
            "head_sliding_offset": 1,
            "dense_every": 2,
        },
        "pretrained": {},
    }[size]
    config.attention = registry.method_config("attention", "s2", **options)
    if size == "paper":
        config.model.vocab_size = 100_352
        config.model.num_layers = 32
        config.model.embed_dim = 4096
        config.model.num_heads = 32
        config.model.num_kv_heads = 8
        config.model.mlp_dim = 14336
    return config
