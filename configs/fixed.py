"""Masks that stay: a one-shot mask, or another run's, under which weights train on.

    python train.py --config=configs/fixed.py:tiny --workdir=/tmp/fixed
    python train.py --config=configs/fixed.py:pretrained --workdir=/tmp/fixed \
        --config.init_from=/tmp/smollm2 --config.sparsity.prior=/tmp/smollm2-wanda

All projections of attention and MLP are 2:4, by magnitude unless `sparsity.prior` names a run. The
random start has no magnitudes worth keeping: it is the baseline that learned masks must beat.

tiny: 0.1 M parameters, seconds on a CPU, for tests.
small: the dense baseline's 124 M, one GPU or TPU chip.
paper: the dense baseline's 1.3 B, a TPU pod slice or 8 GPUs.
pretrained: any imported model, which `init_from` names.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns fixed masks at a size: "tiny", "small", "paper" or "pretrained"."""
    config = presets.baseline(size)
    config.sparsity = registry.method_config("sparsity", "fixed")
    return config
