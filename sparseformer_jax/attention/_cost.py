"""What a layer's attention costs beside its projections."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """The arithmetic of one layer's attention in one pass over a sequence.

    Attributes:
      density: attended fraction of the (causal) query-key pairs; training passes three times
        over them, unless nothing but detached modules trains.
      own: FLOPs a token of what the method computes besides, as gates; in training with its
        backward pass.
    """

    density: float
    own: float = 0.0
