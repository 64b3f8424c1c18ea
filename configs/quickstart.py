"""A byte-level language model on the Python standard library's source, in two minutes.

    python train.py --config=configs/quickstart.py --workdir=/tmp/quickstart

Needs no download and no accelerator: two CPU cores take a minute or two. Expect about
3.3 bits per byte on held-out files. `quickstart.py:masformer`, `:routing`, `:combiner` and
`:dense` train the same model with other attention.
"""

from ml_collections import ConfigDict

from sparseformer_jax import default_config, registry
from sparseformer_jax.checks import check_choice

ATTENTION = {
    "s2": {"block_size": 32, "local_blocks": 2, "vert_stride": 4},
    "masformer": {"span_size": 128, "num_full_layers": 1},
    "combiner": {"span_size": 32},
    "routing": {"num_clusters": 8, "window_size": 64, "block_size": 32},
    "dense": {},
}


def get_config(method: str = "s2") -> ConfigDict:
    """Returns the quickstart of an attention method: a key of `ATTENTION`."""
    check_choice("config argument", method, tuple(ATTENTION))
    config = default_config.get_config()
    config.attention = registry.method_config("attention", method, **ATTENTION[method])
    config.data.seq_len = 512
    config.train.num_steps = 200
    config.train.batch_size = 8
    config.optimizer.warmup_steps = 20
    config.eval.every = 50
    config.eval.num_batches = 8
    config.checkpoint.every = 100
    return config
