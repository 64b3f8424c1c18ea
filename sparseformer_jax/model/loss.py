"""The training loss: cross-entropy over weighted targets, with an optional z-loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns sum w (log Z - logit of the target), in nats, and sum w (log Z)^2.

    Z is the softmax normaliser. The second sum is the z-loss of PaLM (Chowdhery et al.
    2022, section 5). Both are sums: the caller divides by the weight of the whole batch.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum instead of a gather stays local where the vocabulary is sharded.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    target_logits = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jnp.sum(weights * (log_z - target_logits)), jnp.sum(weights * jnp.square(log_z))
