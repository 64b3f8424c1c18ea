"""Progressive Gradient Flow (Bambhaniya et al. 2024, arXiv 2402.04744): n:m from dense weights.

    python train.py --config=configs/pgf.py:mdgf_exponential,1:8 --workdir=/tmp/pgf
    python train.py --config=configs/pgf.py:sr_ste,2:4,small --workdir=/tmp/pgf

The argument is a recipe, a pattern and a size, each of which may be left out: sr_ste, mdgf_linear,
mdgf_exponential, sdgf_stepwise or sdgf_geometric; n kept of every m; tiny, small, paper or
pretrained. The MLPs are sparse; `--config.sparsity.targets=ff=2:4,qkv=1:4` says otherwise. The
first tenth of the steps is dense, the last fifth has hard masks.

tiny: 0.1 M parameters, seconds on a CPU, for tests.
small: the dense baseline's 124 M, one GPU or TPU chip.
paper: the dense baseline's 1.3 B, a TPU pod slice or 8 GPUs; the paper's own models are T5 and ViT.
pretrained: any imported model, which `init_from` names.
"""

import typing

from ml_collections import ConfigDict

from sparseformer_jax import presets, registry
from sparseformer_jax.checks import check_choice
from sparseformer_jax.sparsity.pgf import Recipe

RECIPES = typing.get_args(Recipe)
_SIZES = ("tiny", "small", "paper", "pretrained")


def get_config(argument: str = "tiny") -> ConfigDict:
    """Returns a run of "RECIPE,N:M,SIZE", of which each part may be left out."""
    recipe, pattern, size = "mdgf_exponential", "2:4", "tiny"
    for part in filter(None, argument.split(",")):
        if ":" in part:
            pattern = part
        elif part in _SIZES:
            size = part
        else:
            check_choice("config argument", part, (*RECIPES, *_SIZES, "2:4"))
            recipe = part
    config = presets.baseline(size)
    num_steps = config.train.num_steps
    config.sparsity = registry.method_config(
        "sparsity",
        "pgf",
        recipe=recipe,
        targets=(f"ff={pattern}",),
        dense_steps=num_steps // 10,
        decay_steps=num_steps * 7 // 10,
    )
    return config
