"""The training loss: cross-entropy over weighted targets, with an optional z-loss, in chunks."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparseformer_jax import mesh

Sums = tuple[Float[Array, ""], Float[Array, ""]]

# Logits a device holds at a time: 256 MiB in float32, 1024 tokens of a vocabulary of 50 k,
# which fills its matrix units. The logits of a batch would take gigabytes.
LOGITS_AT_ONCE = 2**26


@runtime_checkable
class OutputHead(Protocol):
    """What the loss asks of a model."""

    def output_kernel(self) -> jax.Array:
        """Returns the matrix [D, V] of the output head, whole along D."""

    def logits(self, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns the logits [B, T, V] of hidden states [B, T, D], token by token."""


def cross_entropy(
    head: OutputHead,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Sums:
    """Returns sum w (log Z - logit of the target), in nats, and sum w (log Z)^2.

    Z is the softmax normaliser. The second sum is the z-loss of PaLM (Chowdhery et al.
    2022, section 5). Both are sums: the caller divides by the weight of the whole batch.
    Logits exist for a chunk of tokens at a time, and again for it in the backward pass.

    Args:
      head: the model, or what else has its output head.
      hidden: what the output head reads.
      targets: token ids.
      weights: of the targets.
    """
    kernel = head.output_kernel()
    # The gradient of the kernel is summed over chunks: in float32 at least.
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    if not mesh.is_active():
        return _local_sums(head, hidden, kernel, targets, weights, vocab_axis=None)
    (vocab_axis,) = mesh.LOGICAL_AXES["vocab"]
    token_axes = mesh.LOGICAL_AXES["batch"] + mesh.LOGICAL_AXES["seq"]

    def local(*arrays: jax.Array) -> Sums:
        return jax.lax.psum(_local_sums(head, *arrays, vocab_axis=vocab_axis), token_axes)

    # Each device takes chunks of its own tokens; the kernel's gradient crosses devices once,
    # after all of them.
    rows = mesh.spec("batch", "seq")
    return jax.shard_map(
        local,
        in_specs=(mesh.spec("batch", "seq", None), mesh.spec(None, "vocab"), rows, rows),
        out_specs=mesh.spec(),
        check_vma=False,
    )(hidden, kernel, targets, weights)


def _local_sums(
    head: OutputHead,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_axis: str | None,
) -> Sums:
    """The sums over this device's tokens, chunk by chunk."""

    def chunk_sums(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> Sums:
        hidden, targets, weights = chunk
        logits = head.logits(hidden, kernel.astype(hidden.dtype))
        return _sums(logits, targets, weights, vocab_axis)

    # A power of two suits the tiles of a product, and divides what most batches hold.
    size = 2 ** max(0, (LOGITS_AT_ONCE // kernel.shape[1]).bit_length() - 1)
    if targets.size <= size:
        return chunk_sums((hidden, targets, weights))
    chunks = tuple(_chunks(x, size) for x in (hidden, targets, weights))
    recomputed = jax.checkpoint(chunk_sums, prevent_cse=False)  # inside scan
    nll, log_z2 = jax.lax.map(recomputed, chunks)
    return jnp.sum(nll), jnp.sum(log_z2)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """The tokens of [B, T, ...] in chunks [C, 1, size, ...]; zeros, of weight 0, fill the last."""
    x = x.reshape(-1, *x.shape[2:])
    missing = -x.shape[0] % size
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, 1, size, *x.shape[1:])


def _sums(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    vocab_axis: str | None,
) -> Sums:
    """The sums of these tokens; `vocab_axis` of the mesh divides their logits."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    tokens = jnp.arange(logits.shape[-1])
    if vocab_axis is not None:
        log_z = jax.nn.logsumexp(jax.lax.all_gather(log_z, vocab_axis), axis=0)
        tokens += jax.lax.axis_index(vocab_axis) * logits.shape[-1]
    # A masked sum finds the target where the vocabulary is divided, and needs no scatter.
    target_logits = jnp.sum(jnp.where(targets[..., None] == tokens, logits, 0), axis=-1)
    if vocab_axis is not None:
        target_logits = jax.lax.psum(target_logits, vocab_axis)
    return jnp.sum(weights * (log_z - target_logits)), jnp.sum(weights * jnp.square(log_z))
