"""A byte-level language model on the Python standard library's source, in two minutes.

    python train.py --config=configs/quickstart.py --workdir=/tmp/quickstart

Needs no download and no accelerator: two CPU cores take a minute or two. Expect about
2.3 bits per byte on held-out files. `quickstart.py:masformer`, `:routing`, `:combiner` and
`:dense` train the same model with other attention, `:pgf` and `:maskllm` dense attention with
weights of which two of every four are kept. Several devices need more than the two rows
of a step: `--config.train.batch_size=8`.
"""

from ml_collections import ConfigDict

from sparseformer_jax import default_config, registry
from sparseformer_jax.checks import check_choice

ATTENTION = {
    "s2": {"block_size": 16, "local_blocks": 2, "vert_stride": 4},
    "masformer": {"span_size": 64, "num_full_layers": 1},
    "combiner": {"span_size": 16},
    "routing": {"num_clusters": 8, "window_size": 32, "block_size": 16},
    "dense": {},
}


SPARSITY = {
    "pgf": {"dense_steps": 200, "decay_steps": 1200},
    # Weights are not frozen: their masks must move slowly.
    "maskllm": {
        "schedule_steps": 2000,
        "learning_rate_multiplier": 0.03,
        "weight_decay": 0.0,
        "regularizer": 0.0,
    },
}


def get_config(method: str = "s2") -> ConfigDict:
    """Returns the quickstart of a method: a key of `ATTENTION` or `SPARSITY`."""
    check_choice("config argument", method, (*ATTENTION, *SPARSITY))
    config = default_config.get_config()
    attention = "dense" if method in SPARSITY else method
    config.attention = registry.method_config("attention", attention, **ATTENTION[attention])
    if method in SPARSITY:
        config.sparsity = registry.method_config("sparsity", method, **SPARSITY[method])
    # Two cores have time for a million tokens, from which many small steps of a shallow model
    # learn more than fewer steps of a deeper or wider one; docs/benchmarks.md has numbers.
    config.model.num_layers = 2
    config.model.mlp = "gelu_tanh"
    config.model.mlp_dim = 512
    config.model.qk_norm = True
    config.model.tie_embeddings = False
    config.data.seq_len = 256
    config.train.num_steps = 2000
    config.train.batch_size = 2
    config.train.log_every = 50
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "wsd"  # with no plateau: a straight line down to 0
    config.optimizer.warmup_steps = 200
    config.optimizer.decay_steps = 1800
    config.optimizer.final_fraction = 0.0
    config.eval.every = 500
    config.eval.num_batches = 32
    config.checkpoint.every = 1000
    return config
