"""SeerAttention (Gao et al. 2024, arXiv 2410.13276; 2025, arXiv 2506.08889): distilled gates.

    python train.py --config=configs/dense.py:tiny --workdir=/tmp/dense
    python train.py --config=configs/seer.py:tiny --config.init_from=/tmp/dense --workdir=/tmp/seer

Only the gates train; the model attends densely in training, and in evaluation to what they choose.

tiny: 0.1 M parameters, seconds on a CPU, for tests; gates of single queries, two blocks each.
small: gates of blocks for a run of configs/dense.py:small, at a density of 0.2.
paper: the same of configs/dense.py:paper, 64 tokens a block.
pretrained: gates for any imported model, which `init_from` names.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns SeerAttention at a size: "tiny", "small", "paper" or "pretrained"."""
    config = presets.baseline(size)
    of_queries = {
        "gates": "decode",
        "block_size": 16,
        "query_projection": "group",
        "gate_norm": True,
        "token_budget": 32,
    }
    options = of_queries if size == "tiny" else {"density": 0.2}
    config.attention = registry.method_config("attention", "seer", **options)
    config.train.trainable = r".*/attention/gate/.*"
    config.model.remat = "none"  # little is kept for gates, and layers would be computed twice
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    return config
