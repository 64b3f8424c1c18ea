"""SeerAttention (Gao et al. 2024, arXiv 2410.13276; 2025, arXiv 2506.08889): distilled gates.

    python -m sparseformer_jax.pretrained import SOURCE --workdir=/tmp/smollm2
    python train.py --config=configs/seer.py:smollm2 --config.init_from=/tmp/smollm2 \
        --config.data.files=/data/books --workdir=/tmp/smollm2-seer
    python eval.py --workdir=/tmp/smollm2-seer --config.attention.density=0.1 --plots=/tmp/plots

Only the gates train; the model attends densely in training, and in evaluation to what they choose.
Layers of windows stay as they are.

tiny: 0.1 M parameters, seconds on a CPU, for tests; gates of single queries, two blocks each.
small: gates of blocks for a run of configs/dense.py:small, at a density of 0.2.
paper: Llama 3.1 8B, 500 steps of 16 x 65,536 tokens; `init_from` names an import of it.
pretrained: gates for any imported model, which `init_from` names, in windows of 1024 tokens.
extend: Llama 3, 8.1 B parameters with gates, from 8k to 32k tokens by YaRN, all trained together as
in the first version of 2410.13276, but with KL for its MSE; after the gates, and from that run:

    python train.py --config=configs/seer.py:pretrained --config.init_from=/tmp/llama3 \
        --config.data.seq_len=8192 --workdir=/tmp/llama3-seer
    python train.py --config=configs/seer.py:extend --config.init_from=/tmp/llama3-seer \
        --config.data.tokenizer=TOKENIZER_JSON --workdir=/tmp/llama3-seer-32k

smollm2: SmolLM2-135M, in steps that two CPU cores can take, and in blocks of 16 tokens: a window
of 2048 is short for more; gemma3: Gemma 3 270M, alike.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry
from sparseformer_jax.checks import check_choice

_SIZES = ("tiny", "small", "paper", "extend", "pretrained")
_ON_CPU = ("smollm2", "gemma3")
_OF_QUERIES = {
    "gates": "decode",
    "block_size": 16,
    "query_projection": "group",
    "gate_norm": True,
    "token_budget": 32,
}


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns SeerAttention at a size: one of the baselines', "extend", "smollm2" or "gemma3"."""
    check_choice("config argument", size, (*_SIZES, *_ON_CPU))
    baselines = dict.fromkeys(_ON_CPU, "pretrained") | {"extend": "paper"}
    config = presets.baseline(baselines.get(size, size))
    options = {
        "tiny": _OF_QUERIES,
        "paper": {"threshold": 5e-4, "dense_rows": 2},
        "extend": {
            "density": 0.1053,
            "joint": True,
            "loss_weight": 10.0,
            "loss_reduction": "element_mean",
        },
    }
    chosen = options.get(size, {"density": 0.2})
    config.attention = registry.method_config("attention", "seer", **chosen)
    config.train.trainable = r".*/attention/gate/.*"
    config.model.remat = "none"  # little is kept for gates, and layers would be computed twice
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    if size == "paper":
        _llama31(config)
    if size == "extend":
        _extended_llama3(config)
    if size in _ON_CPU:
        config.attention.block_size = 16
        config.data.seq_len = 2048
        config.optimizer.learning_rate = 3e-3
        config.train.batch_size = 1
        config.train.num_steps = 300
        config.optimizer.warmup_steps = 20
    return config


def _llama31(config: ConfigDict) -> None:
    """Llama 3.1 8B, in the batches of the release."""
    _llama3(config)
    config.model.max_positions = 131_072
    config.model.rope_scaling = "llama3"
    config.model.rope_factor = 8.0
    config.data.seq_len = 65_536
    config.train.batch_size = 16
    config.train.num_steps = 500
    config.optimizer.schedule = "cosine"


def _extended_llama3(config: ConfigDict) -> None:
    """Llama 3 8B at four times its length; all weights train, and gates go on to learn."""
    _llama3(config)
    config.model.max_positions = 32_768
    config.model.rope_scaling = "yarn"
    config.model.rope_factor = 4.0
    config.model.remat = "full"
    config.data.seq_len = 32_768
    config.train.batch_size = 8
    config.train.num_steps = 400
    config.train.trainable = "all"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_steps = 380


def _llama3(config: ConfigDict) -> None:
    """The sizes that versions of Llama 3 8B share, and what their runs do."""
    model = config.model
    model.vocab_size = 128_256
    model.num_layers = 32
    model.embed_dim = 4096
    model.num_heads = 32
    model.num_kv_heads = 8
    model.head_dim = 128
    model.mlp_dim = 14336
    model.norm_eps = 1e-5
    model.tie_embeddings = False
    model.rope_theta = 500_000.0
    model.rope_original_positions = 8192
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
