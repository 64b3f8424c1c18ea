"""A pretrained model goes on training, with its own attention or with another method's.

    python -m sparseformer_jax.pretrained import SOURCE --workdir=/tmp/model
    python train.py --config=configs/pretrained.py:s2:/tmp/model --workdir=/tmp/sparse \
        --config.data.files=/data/books --config.attention.block_size=32

The argument is METHOD:WORKDIR; `own:/tmp/model` keeps the attention it was trained with. Model and
tokenizer are those of the workdir, and so are the parameters, by `init_from`. With 135 M
parameters a step of 8 x 1024 tokens takes most of a minute on two CPU cores: meant for a GPU or
TPU, with `--config.model.compute_dtype=bfloat16`.
"""

from ml_collections import ConfigDict

from sparseformer_jax import command, registry
from sparseformer_jax.checks import ConfigError, check_choice


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config of a run that starts from a workdir: "METHOD:WORKDIR"."""
    method, _, workdir = argument.partition(":")
    if not workdir:
        raise ConfigError(
            f"config argument={argument!r}: must be METHOD:WORKDIR, as in "
            "--config=configs/pretrained.py:s2:/tmp/model"
        )
    check_choice("config argument", method, ("own", *registry.names("attention")))
    config = command.saved(workdir)
    config.init_from = workdir
    if method != "own":
        config.attention = registry.method_config("attention", method)
    config.optimizer.learning_rate = 1e-4  # of a model that is already good
    config.eval.split = "validation"
    return config
