"""Dense weights."""

import dataclasses
from typing import ClassVar

from sparseformer_jax.sparsity.base import WeightSparsity


@dataclasses.dataclass(frozen=True)
class Options:
    """Dense weights have no options."""

    targets: ClassVar[tuple[str, ...]] = ()


class Method(WeightSparsity):
    """No weight is sparse."""
