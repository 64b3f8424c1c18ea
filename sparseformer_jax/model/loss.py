"""The training loss: cross-entropy over weighted targets, with an optional z-loss, in chunks."""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

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

    def sums(
        logits: jax.Array, targets: jax.Array, vocab_axis: str | None, weights: jax.Array
    ) -> Sums:
        nll, log_z = _of_tokens(logits, targets, vocab_axis)
        return jnp.sum(weights * nll), jnp.sum(weights * jnp.square(log_z))

    def total(chunks: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> Sums:
        return jax.lax.psum(jax.tree.map(jnp.sum, chunks), axes)

    return _over_tokens(head, hidden, (targets, weights), sums, total, mesh.spec())


def token_losses(
    head: OutputHead, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Returns log Z - logit of the target, in nats, of each token; see `cross_entropy`."""

    def nll(logits: jax.Array, targets: jax.Array, vocab_axis: str | None) -> jax.Array:
        return _of_tokens(logits, targets, vocab_axis)[0]

    return _over_tokens(head, hidden, (targets,), nll, _joined, mesh.spec("batch", "seq"))


def token_scores(
    head: OutputHead, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns what `token_losses` does, and whether each target is the likeliest token.

    Of equal logits the first counts, as greedy decoding takes it.
    """

    def scores(
        logits: jax.Array, targets: jax.Array, vocab_axis: str | None
    ) -> tuple[jax.Array, jax.Array]:
        nll, _ = _of_tokens(logits, targets, vocab_axis)
        return nll, targets == _likeliest(logits, vocab_axis)

    return _over_tokens(head, hidden, (targets,), scores, _joined, mesh.spec("batch", "seq"))


def _joined(chunks: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """What chunks have of each token, [B, T]."""
    return jax.tree.map(lambda x: x.reshape(-1)[: math.prod(shape)].reshape(shape), chunks)


def _over_tokens(
    head: OutputHead,
    hidden: jax.Array,
    rows: tuple[jax.Array, ...],
    of_chunk: Callable[..., Any],
    join: Callable[[Any, tuple[int, ...], tuple[str, ...]], Any],
    spec: PartitionSpec,
) -> Any:
    """What each device joins of its chunks of tokens.

    Args:
      head: the model.
      hidden: what the output head reads.
      rows: targets, and what else `of_chunk` takes of each token.
      of_chunk: called with logits and targets of a chunk's tokens, the axis of the mesh that
        divides the vocabulary, if any, and the rest of its `rows`.
      join: called with what that returns, stacked, the shape [B, T] of a device's tokens, and
        the axes of the mesh that cut them.
      spec: how devices hold the result.
    """
    kernel = head.output_kernel()
    # The gradient of the kernel is summed over chunks: in float32 at least.
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))

    def local(
        hidden: jax.Array,
        kernel: jax.Array,
        *rows: jax.Array,
        vocab_axis: str | None = None,
        token_axes: tuple[str, ...] = (),
    ) -> Any:
        found = _in_chunks(head, hidden, kernel, rows, of_chunk, vocab_axis)
        return join(found, rows[0].shape, token_axes)

    if not mesh.is_active():
        return local(hidden, kernel, *rows)
    (vocab_axis,) = mesh.LOGICAL_AXES["vocab"]
    token_axes = mesh.LOGICAL_AXES["batch"] + mesh.LOGICAL_AXES["seq"]

    # Each device takes chunks of its own tokens; the kernel's gradient crosses devices once,
    # after all of them.
    cut = mesh.spec("batch", "seq")
    return jax.shard_map(
        functools.partial(local, vocab_axis=vocab_axis, token_axes=token_axes),
        in_specs=(mesh.spec("batch", "seq", None), mesh.spec(None, "vocab"), *[cut] * len(rows)),
        out_specs=spec,
        check_vma=False,
    )(hidden, kernel, *rows)


def _in_chunks(
    head: OutputHead,
    hidden: jax.Array,
    kernel: jax.Array,
    rows: tuple[jax.Array, ...],
    of_chunk: Callable[..., Any],
    vocab_axis: str | None,
) -> Any:
    """What `of_chunk` returns of this device's tokens: of all of them at once, or stacked."""

    def run(chunk: tuple[jax.Array, ...]) -> Any:
        hidden, targets, *rest = chunk
        logits = head.logits(hidden, kernel.astype(hidden.dtype))
        return of_chunk(logits, targets, vocab_axis, *rest)

    # A power of two suits the tiles of a product, and divides what most batches hold.
    size = 2 ** max(0, (LOGITS_AT_ONCE // kernel.shape[1]).bit_length() - 1)
    if rows[0].size <= size:
        return run((hidden, *rows))
    chunks = tuple(_chunks(x, size) for x in (hidden, *rows))
    return jax.lax.map(jax.checkpoint(run, prevent_cse=False), chunks)  # inside scan


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """The tokens of [B, T, ...] in chunks [C, 1, size, ...]; zeros, of weight 0, fill the last."""
    x = x.reshape(-1, *x.shape[2:])
    missing = -x.shape[0] % size
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, 1, size, *x.shape[1:])


def _of_tokens(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], vocab_axis: str | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """nll and log Z of these tokens; `vocab_axis` of the mesh divides their logits."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    tokens = jnp.arange(logits.shape[-1])
    if vocab_axis is not None:
        log_z = jax.nn.logsumexp(jax.lax.all_gather(log_z, vocab_axis), axis=0)
        tokens += jax.lax.axis_index(vocab_axis) * logits.shape[-1]
    # A masked sum finds the target where the vocabulary is divided, and needs no scatter.
    target_logits = jnp.sum(jnp.where(targets[..., None] == tokens, logits, 0), axis=-1)
    if vocab_axis is not None:
        target_logits = jax.lax.psum(target_logits, vocab_axis)
    return log_z - target_logits, log_z


def _likeliest(logits: Float[Array, "B T V"], vocab_axis: str | None) -> Int[Array, "B T"]:
    """The token with the largest logit; `vocab_axis` of the mesh divides them."""
    size = logits.shape[-1]
    # Two plain reductions: on a CPU jnp.argmax, a reduction of pairs, takes five times as long.
    best = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == best, jnp.arange(size), size), axis=-1)
    if vocab_axis is None:
        return first
    firsts = jax.lax.all_gather(first + jax.lax.axis_index(vocab_axis) * size, vocab_axis)
    shard = jnp.argmax(jax.lax.all_gather(best[..., 0], vocab_axis), axis=0)
    return jnp.take_along_axis(firsts, shard[None], axis=0)[0]
