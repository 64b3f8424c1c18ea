"""What a gate learns from: the largest weights of its layer's dense attention, block by block."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from pallas_kernels import block_max_attention
from sparseformer_jax.attention import _block_choice, _pooled_blocks, _query_chunks
from sparseformer_jax.attention._block_selection import SelectionOptions, choose
from sparseformer_jax.attention._gate_scores import Scored, scored_by
from sparseformer_jax.attention._gates import BlockGate
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig

# Of no document: queries that a block does not pool see nothing when its target is made.
_NOWHERE = np.iinfo(np.int32).min
_KEPT = "block_target"  # what of a chunk the backward pass does not make anew


@dataclasses.dataclass(frozen=True)
class DistillationOptions(SelectionOptions):
    """What training does, beside what gates choose.

    Attributes:
      loss_reduction: "row_mean" is KL in nats; "element_mean", as released, divides it by the
        number of blocks.
      loss_start: fraction of the sequence whose rows, the first, the loss leaves out.
      loss_weight: of the loss beside others; the release has 10.
      joint: training attends to what gates choose, as evaluation does, for weights that train
        with them; gates still learn from dense attention.
    """

    loss_reduction: Literal["row_mean", "element_mean"] = "row_mean"
    loss_start: float = 0.25
    loss_weight: float = 1.0
    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.loss_start < 1:
            raise ValueError(f"loss_start={self.loss_start} must be at least 0 and below 1")
        if self.joint and not self.chooses:
            raise ValueError(
                "joint=True attends to what gates choose; set density, threshold or token_budget, "
                "or joint=False"
            )


def target_of(
    options: SelectionOptions,
    config: ModelConfig,
    inputs: Inputs,
    shard: Shard,
    lse: Float[Array, "B T N"],
    scored: Scored,
) -> tuple[Float[Array, "B n M J"], Bool[Array, "..."]]:
    """Returns what the gate is to say of each row, and of which blocks; no gradient leaves it.

    Args:
      options: of the gate.
      config: of the model.
      inputs: of the layer.
      shard: where they lie.
      lse: log-sum-exp of dense attention.
      scored: the rows.
    """
    is_prefill, size = options.gates == "prefill", options.block_size
    segment_ids = inputs.segment_ids
    if segment_ids is not None:
        of_query, of_key = segment_ids
        segment_ids = (jnp.where(scored.is_kept, of_query, _NOWHERE), of_key)
    maxima = block_max_attention(
        inputs.query,
        inputs.key,
        lse,
        query_block_size=size if is_prefill else None,
        key_block_size=size,
        is_causal=True,
        segment_ids=segment_ids,
        scale=config.scale,
        logits_soft_cap=config.attention_soft_cap,
        query_offset=shard.query_offset,
        group_reduction=None if is_prefill else "max",
    )
    if is_prefill:
        visible = scored.past | scored.own
        return _block_choice.shares_of(maxima, visible), visible
    return _block_choice.shares_of(maxima, scored.past, epsilon=1e-9), scored.past


def distilled(
    gate: BlockGate,
    options: DistillationOptions,
    config: ModelConfig,
    inputs: Inputs,
    shard: Shard,
    lse: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T"], dict[str, Float[Array, ""]]]:
    """Returns the loss of each token, and how well the gate chooses, means over rows and heads.

    "kl" is that of rows of which the loss speaks, in nats. Where the gate chooses, "mass" is the
    part of the target that the chosen blocks have, "recall" that of the blocks which the target
    itself would have chosen, "gate_density" the attended fraction of pairs, "overflow" that of
    rows which `capacity` cuts. All gradients are the gate's.

    Args:
      gate: of the layer.
      options: of the gate and its loss.
      config: of the model.
      inputs: of the layer.
      shard: where they lie.
      lse: log-sum-exp of dense attention.
    """

    def rows(inputs: Inputs, shard: Shard, lse: jax.Array) -> dict[str, jax.Array]:
        scored = scored_by(gate, inputs, shard)
        target, visible = target_of(options, config, inputs, shard, lse, scored)
        target = checkpoint_name(target, _KEPT)
        found = {"kl": _block_choice.divergence(target, scored.scores, visible)}
        if options.chooses:
            found |= _of_choice(options, scored, target, inputs, shard)
        return {name: jnp.mean(x, axis=1, dtype=jnp.float32) for name, x in found.items()}

    if options.gates == "prefill":
        found = rows(inputs, shard, lse)
    else:
        # The target is kept: it costs a product of all queries and keys.
        policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
        found = _query_chunks.mapped(rows, inputs, shard, lse, policy=policy)
    kl = found["kl"] = _of_tokens(options, found["kl"], inputs, shard)
    factor = options.loss_weight
    if options.loss_reduction == "element_mean":
        factor /= -(-inputs.key.shape[1] // options.block_size)
    means = {name: jnp.mean(x) for name, x in found.items()}
    return factor * kl, jax.lax.stop_gradient(means)


def told(
    gate: BlockGate,
    options: DistillationOptions,
    config: ModelConfig,
    inputs: Inputs,
    shard: Shard,
    lse: Float[Array, "B T N"],
) -> dict[str, Array]:
    """Returns the shares of the "gate" [B, n, M, J], its "target", and which blocks are "past".

    Args:
      gate: of the layer.
      options: of the gate.
      config: of the model.
      inputs: of the layer.
      shard: where they lie.
      lse: log-sum-exp of dense attention.
    """
    scored = scored_by(gate, inputs, shard)
    target, visible = target_of(options, config, inputs, shard, lse, scored)
    shares = jnp.where(visible, jnp.exp(_block_choice.log_shares(scored.scores, visible)), 0)
    past = jnp.broadcast_to(scored.past[:, 0], (len(target), *target.shape[2:]))
    return {"gate": shares, "target": target, "past": past}


def _of_choice(
    options: DistillationOptions, scored: Scored, target: jax.Array, inputs: Inputs, shard: Shard
) -> dict[str, jax.Array]:
    """What there is to tell of the chosen blocks of each row [B, n, M]."""
    chosen, overflow = choose(options, scored)
    best = _block_choice.highest(target, scored.past, options.most_blocks(target.shape[-1]) - 1)
    num_queries, num_keys = inputs.query.shape[1], inputs.key.shape[1]
    places = shard.query_offset + jnp.arange(num_queries)
    pairs = _pooled_blocks.pairs(chosen, places, num_keys, options.block_size)
    # Of those that a row has on average in the sequence.
    all_pairs = num_queries / pairs.shape[1] * (num_keys + 1) / 2
    return {
        "mass": _block_choice.fraction(target * chosen, target),
        "recall": _block_choice.fraction(best & chosen, best),
        "gate_density": (pairs / all_pairs)[:, None],
        "overflow": overflow,
    }


def _of_tokens(
    options: DistillationOptions, rows: jax.Array, inputs: Inputs, shard: Shard
) -> jax.Array:
    """Gives each token what its row has, so that the mean over tokens is that over rows."""
    num_keys, size = inputs.key.shape[1], options.block_size
    if options.gates == "prefill":
        skipped = size * int(-(-num_keys // size) * options.loss_start)
        ids = inputs.segment_ids and inputs.segment_ids[0]
        tokens = _pooled_blocks.of_tokens(rows, size, ids, inputs.query.shape[1])
    else:
        skipped, tokens = int(num_keys * options.loss_start), rows
    place = shard.query_offset + jnp.arange(tokens.shape[1])
    return num_keys / (num_keys - skipped) * jnp.where(place >= skipped, tokens, 0)
