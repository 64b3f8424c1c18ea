"""The dense baselines every method is compared with, at three sizes."""

from ml_collections import ConfigDict

from sparseformer_jax import default_config
from sparseformer_jax.checks import check_choice


def baseline(size: str) -> ConfigDict:
    """Returns the dense baseline of a size, whose attention a method's config replaces.

    "tiny": 0.1 M parameters and a vocabulary of bytes, for tests on a CPU; "small": 124 M, 8k
    tokens, one GPU or TPU chip; "paper": 1.3 B, 8k tokens, a TPU pod slice or 8 GPUs. The
    last two have the vocabulary of GPT-2's tokenizer, to be given as `data.tokenizer`.
    "pretrained": the model and the tokenizer of the run that `init_from` names.

    Raises:
      ValueError: the size is another.
    """
    sizes = {"tiny": _tiny, "small": _small, "paper": _paper, "pretrained": _pretrained}
    check_choice("config size", size, tuple(sizes))
    config = default_config.get_config()
    sizes[size](config)
    return config


def _tiny(config: ConfigDict) -> None:
    config.model.num_layers = 2
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 16
    config.model.mlp_dim = 128
    config.data.seq_len = 128
    config.train.num_steps = 20
    config.train.batch_size = 8
    config.optimizer.warmup_steps = 5
    config.optimizer.decay_steps = 5
    config.eval.num_batches = 2


def _small(config: ConfigDict) -> None:
    config.model.vocab_size = 50_304  # GPT-2's 50,257, filled up to a multiple of 128
    config.model.num_layers = 12
    config.model.embed_dim = 768
    config.model.num_heads = 12
    config.model.num_kv_heads = 12
    config.model.head_dim = 64
    config.model.mlp_dim = 2048
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.data.seq_len = 8192
    config.train.num_steps = 20_000
    config.train.batch_size = 32
    config.train.accumulation_steps = 4
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.decay_steps = 4000
    config.eval.every = 1000
    config.checkpoint.every = 1000


def _paper(config: ConfigDict) -> None:
    _small(config)
    config.model.num_layers = 24
    config.model.embed_dim = 2048
    config.model.num_heads = 16
    config.model.num_kv_heads = 16
    config.model.head_dim = 128
    config.model.mlp_dim = 5632
    config.train.batch_size = 64
    config.train.num_steps = 100_000
    config.train.accumulation_steps = 1
    config.optimizer.learning_rate = 2e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1


def _pretrained(config: ConfigDict) -> None:
    config.init_settings = True
    config.data.seq_len = 1024
    config.optimizer.learning_rate = 1e-4  # of a model that is already good
    config.eval.batch_size = 2
