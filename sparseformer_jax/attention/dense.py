"""Dense attention: every query sees every key, or every earlier one.

    o_i = sum_j softmax_j(s q_i k_j) v_j,  j <= i when causal

Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, section 3.2. Computed
tile by tile, so memory is linear in the sequence.
"""

import dataclasses

from ml_collections import ConfigDict

from pallas_kernels.rules import Dense, Rule
from sparseformer_jax.attention._block_sparse import check_implementation
from sparseformer_jax.attention._by_rule import RuleAttention


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of dense attention.

    Attributes:
      implementation: of the kernel, see `block_sparse_attention`; None: the best here.
    """

    implementation: str | None = None


def check(options: Options, config: ConfigDict) -> None:
    """Refuses an unknown implementation.

    Raises:
      ValueError: there is none of that name.
    """
    check_implementation(options.implementation)


class Method(RuleAttention):
    """Dense attention."""

    def rule(self) -> Rule:
        """Returns the rule that hides nothing."""
        return Dense()
