"""Routing Transformer (Roy et al. 2021, arXiv 2003.05997): heads that attend inside clusters.

    python train.py --config=configs/routing.py:tiny --workdir=/tmp/routing

tiny: 0.1 M parameters, seconds on a CPU, for tests.
small: the dense baseline with 120 M, 8k tokens, 6 of 12 heads routed, 32 clusters, windows of 256.
paper: enwik8 as in the authors' code, 164 M: 12 layers, 8k bytes, 4 of 8 heads routed, 16 clusters
  of 512; their logits, centroids, relative positions and selection, which is not strictly
  causal. With --config.attention.selection=causal it is.
pretrained: any imported model, which `init_from` names, with this attention in place of its own.
"""

from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the Routing Transformer at a size: "tiny", "small", "paper" or "pretrained"."""
    config = presets.baseline(size)
    options: dict[str, Any] = {
        "tiny": {"num_clusters": 4, "window_size": 16, "block_size": 16},
        "small": {"num_clusters": 32, "window_size": 256, "block_size": 256},
        "paper": {
            "num_clusters": 16,
            "window_size": 512,
            "selection": "paper",
            "masks_self": False,
            "logit_scale": 1.0,
            "centroid_update": "released",
            "routed_relative": 513,
            "block_size": 256,
            "local_relative": 513,
        },
        "pretrained": {},
    }[size]
    config.attention = registry.method_config("attention", "routing", **options)
    config.model.num_kv_heads = config.model.num_heads
    if size == "paper":
        _enwik8(config)
    return config


def _enwik8(config: ConfigDict) -> None:
    config.model.vocab_size = 258
    config.model.num_layers = 12
    config.model.embed_dim = 1024
    config.model.num_heads = 8
    config.model.num_kv_heads = 8
    config.model.mlp_dim = 3072
    config.model.position = "none"
