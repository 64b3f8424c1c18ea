"""MaskLLM (Fang et al. 2024, arXiv 2409.17481): 2:4 masks of frozen weights, learned by gradients.

    python -m sparseformer_jax.pretrained import SOURCE --workdir=/tmp/smollm2
    python train.py --config=configs/maskllm.py:smollm2 --config.init_from=/tmp/smollm2 \
        --config.data.files=/data/books --workdir=/tmp/smollm2-2to4

All projections of attention and MLP are sparse; only mask logits train. Start from a better mask
than that of magnitudes where there is one: `--config.sparsity.prior=WORKDIR`, of
`python -m sparseformer_jax.sparsity prune`.

tiny: 0.1 M parameters, seconds on a CPU, for tests; weights start random and train too.
small: the dense baseline's 124 M, one GPU or TPU chip; give `init_from`.
paper: LLaMA-2 7 B, 2000 steps of 256 x 4096 tokens, a TPU pod slice; give `init_from`.
pretrained: any imported model, which `init_from` names, in windows of 1024 tokens.
smollm2: SmolLM2-135M, in 480 steps of 1024 tokens, which two CPU cores take in an hour; so few
steps start at the prior itself, nearly hard, and noise is small beside `tau`. gemma3: Gemma 3 270M,
alike, but for a regulariser of its scale.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry
from sparseformer_jax.checks import check_choice

ONLY_MASKS = "/mask_logits$"
_SIZES = ("tiny", "small", "paper", "pretrained")
_ON_CPU = ("smollm2", "gemma3")


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns MaskLLM at a size: "tiny", "small", "paper", "pretrained", "smollm2" or "gemma3"."""
    check_choice("config argument", size, (*_SIZES, *_ON_CPU))
    config = presets.baseline("pretrained" if size in _ON_CPU else size)
    config.sparsity = registry.method_config("sparsity", "maskllm")
    config.train.trainable = "all" if size == "tiny" else ONLY_MASKS
    if size == "paper":
        _llama2(config)
    if size != "tiny":
        config.optimizer.learning_rate = 5e-4
        config.optimizer.warmup_steps = 0
        config.optimizer.eps = 1e-5
        config.train.num_steps = 2000
    if size in _ON_CPU:
        config.train.batch_size = 1
        config.train.num_steps = 480
        config.optimizer.learning_rate = 1.5e-3
        config.optimizer.warmup_steps = 20
        config.optimizer.b2 = 0.99
        # With 0.01 and 3 one group in 18 starts at another mask than the prior's.
        config.sparsity.init_std = 0.003
        config.sparsity.prior_weight = 10.0
        config.sparsity.kappa = (3000.0, 3000.0)
        config.sparsity.tau = (20.0, 10.0)
        # Squares of Gemma's weights add up to a 33rd of SmolLM2's.
        config.sparsity.regularizer = 1e-3 if size == "gemma3" else 3e-5
    config.sparsity.schedule_steps = config.train.num_steps
    return config


def _llama2(config: ConfigDict) -> None:
    """LLaMA-2 7 B, in the paper's batches."""
    model = config.model
    model.vocab_size = 32_000
    model.num_layers = 32
    model.embed_dim = 4096
    model.num_heads = model.num_kv_heads = 32
    model.head_dim = 128
    model.mlp_dim = 11008
    model.norm_eps = 1e-5
    model.tie_embeddings = False
    config.data.seq_len = 4096
    config.train.batch_size = 256
    config.train.accumulation_steps = 4
