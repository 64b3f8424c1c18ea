"""Dense attention: the baseline of every method, at three sizes; or a pretrained model.

    python train.py --config=configs/dense.py:tiny --workdir=/tmp/dense

tiny: 0.1 M parameters, seconds on a CPU, for tests.
small: 124 M parameters as GPT-2 small, 8k tokens, one GPU or TPU chip.
paper: 1.3 B parameters, 8k tokens, a TPU pod slice or 8 GPUs.
pretrained: any imported model, which `init_from` names, with its own attention.
"""

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the dense baseline at a size: "tiny", "small", "paper" or "pretrained"."""
    config = presets.baseline(size)
    config.attention = registry.method_config("attention", "dense")
    return config
