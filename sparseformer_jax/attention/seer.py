"""SeerAttention: gates that learn from a model's own dense attention which blocks it needs.

    target  p_mj = max of block (m, j) of the attention map / sum over j     (prefill)
            p_tj = max of block j of row t and of its group / sum over j     (decode, j before t's)
    loss    KL(p || softmax(gate scores)), of every layer
    then    attend to the blocks that the gate scores highest, and to the own block

Gao et al. 2024, "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv
2410.13276, and 2025, "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning", arXiv
2506.08889. In training the layer attends densely and its gate learns; what else is computed has no
gradient through the gate, so that with `train.trainable` naming gates alone nothing of the model
is differentiated. In evaluation and decoding the gate chooses, if the options say how many.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from pallas_kernels import block_max_attention
from pallas_kernels.rules import Dense, Rule
from sparseformer_jax.attention import (
    _block_choice,
    _gate_cost,
    _gates,
    _pooled_blocks,
    _query_chunks,
    dense,
    masformer,
)
from sparseformer_jax.attention._block_selection import SelectionOptions, choose
from sparseformer_jax.attention._block_sparse import attend_blocks, check_implementation
from sparseformer_jax.attention._cost import Cost
from sparseformer_jax.attention._gate_scores import Scored, mean_pooled, scored_by
from sparseformer_jax.attention._gated import GatedAttention
from sparseformer_jax.attention.base import Attention, AttentionOutput
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig

# Of no document: queries that a block does not pool see nothing when its target is made.
_NOWHERE = np.iinfo(np.int32).min
_KEPT = "block_target"  # what of a chunk the backward pass does not make anew


@dataclasses.dataclass(frozen=True)
class Options(SelectionOptions):
    """Options of SeerAttention, beside those of its gates and of what they choose.

    Attributes:
      loss_reduction: "row_mean" is KL in nats; "element_mean", as released, divides it by the
        number of blocks.
      loss_start: fraction of the sequence whose rows, the first, the loss leaves out.
      loss_weight: of the loss beside others; the release has 10.
      window_size: tokens that a query sees in `window_layers`, itself counted.
      window_layers: the layers that attend to a window and have no gate, as the model does that
        gates learn from; `pretrained` sizes take them from it.
      implementation: of the kernel, see `block_sparse_attention`; None: the best here.
    """

    loss_reduction: Literal["row_mean", "element_mean"] = "row_mean"
    loss_start: float = 0.25
    loss_weight: float = 1.0
    window_size: int | None = None
    window_layers: tuple[int, ...] = ()
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.window_size is None) != (not self.window_layers):
            raise ValueError(
                f"window_size={self.window_size} and window_layers={self.window_layers}: "
                "set both or none"
            )
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"window_size={self.window_size} must be at least 1")
        if not 0 <= self.loss_start < 1:
            raise ValueError(f"loss_start={self.loss_start} must be at least 0 and below 1")


def check(options: Options, config: ConfigDict) -> None:
    """Refuses what the model cannot do with these options.

    Raises:
      ValueError: implementation is unknown, the model's heads do not allow the gate, or devices
        would cut blocks.
    """
    check_implementation(options.implementation)
    model = ModelConfig(**config.model)
    _gates.check_gates(options, model)
    if not model.is_causal:
        raise ValueError("name='seer' is a decoder's; set model.is_causal=True")
    layers, gated = set(options.window_layers), set(range(model.num_layers))
    if not layers < gated:
        raise ValueError(
            f"window_layers={options.window_layers}: name some, not all, of the layers "
            f"0 to {model.num_layers - 1}"
        )


def adopt(other: Any, num_layers: int) -> dict[str, Any]:
    """Returns the options that keep what the model attends to from which gates learn.

    Args:
      other: the options of its attention.
      num_layers: of the model.

    Raises:
      ValueError: that is neither dense nor windows.
    """
    if isinstance(other, Options):
        return {"window_size": other.window_size, "window_layers": other.window_layers}
    if isinstance(other, masformer.Options) and other.span == "window":
        layers = tuple(layer for layer in range(num_layers) if layer not in other.full)
        return {"window_size": other.span_size, "window_layers": layers} if layers else {}
    if isinstance(other, dense.Options):
        return {}
    raise ValueError(
        "gates learn from dense attention and leave windows as they are; the run in init_from has "
        f"{other}"
    )


def notes(options: Options) -> list[str]:
    """Returns what a run says of these options as it starts."""
    if options.gates == "prefill" and options.chooses:
        return [
            "attention.gates='prefill' is causal in whole blocks only: a block's queries choose "
            "together, so perplexity may profit from tokens of the same block that follow"
        ]
    return []


class Method(GatedAttention):
    """Dense attention beside a gate that learns from it, or attention to what the gate chooses."""

    @classmethod
    def layer_kinds(
        cls, options: Options, num_layers: int
    ) -> Sequence[tuple[type[Attention], Any]]:
        """Returns this attention, or a window without a gate where the options name the layer."""
        if options.window_size is None:
            return super().layer_kinds(options, num_layers)
        window = masformer.Options(
            "window", options.window_size, 0, implementation=options.implementation
        )
        return [
            (masformer.Method, window) if layer in options.window_layers else (cls, options)
            for layer in range(num_layers)
        ]

    def rule(self) -> Rule:
        """Returns the rule of dense attention, from which gates learn."""
        return Dense()

    def density(self, seq_len: int) -> float:
        """Returns the fraction of pairs that are attended to; with a threshold, at most.

        A sequence is taken for one document.
        """
        if not self.options.chooses:
            return 1.0
        size, place = self.options.block_size, np.arange(seq_len)
        num_blocks, own = -(-seq_len // size), place // size
        most = np.minimum(own, self.options.most_blocks(num_blocks) - 1)
        past = np.where(own >= num_blocks - self.options.dense_rows, own, most)
        return float(np.sum(past * size + place % size + 1) / np.sum(place + 1))

    def cost(self, seq_len: int, *, is_training: bool) -> Cost:
        """Returns what attention costs: in training all pairs, the gate and its target."""
        options, config = self.options, self.config
        if not (is_training or options.chooses):
            return Cost(1.0)
        own = _gate_cost.gate_flops(options, config, seq_len, is_training=is_training)
        if not is_training:
            return Cost(self.density(seq_len), own)
        return Cost(1.0, own + _gate_cost.target_flops(config, seq_len))

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns dense attention and the gate's loss in training, else what the gate chooses.

        Without keys to pool attention is dense.
        """
        if inputs.noise is not None:
            return self._distilled(inputs, shard)
        if not self.options.chooses or inputs.unrotated_key is None:
            output = super().attend(inputs, shard).output
            return AttentionOutput(output, diagnostics={"density": jnp.ones(())})
        return self._attend_chosen(inputs, shard)

    def _distilled(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Dense attention, and the loss of the gate that learns from it."""
        output, lse = self._dense(inputs, shard)
        if self.options.gates == "prefill":
            rows = self._rows(inputs, shard, lse)
        else:
            # The target is kept: it costs a product of all queries and keys.
            policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
            rows = _query_chunks.mapped(self._rows, inputs, shard, lse, policy=policy)
        loss = self._loss_of_tokens(rows.pop("loss"), inputs, shard)
        diagnostics = {name: jnp.mean(x) for name, x in rows.items()}
        return AttentionOutput(output, {"gate": loss}, diagnostics | {"density": jnp.ones(())})

    def _rows(self, inputs: Inputs, shard: Shard, lse: jax.Array) -> dict[str, jax.Array]:
        """What the gate is told of each row [B, M]: its loss, and how well it would choose.

        "mass" is the part of the target that the chosen blocks have, "recall" that of the blocks
        which the target itself would have chosen, "overflow" the heads that `capacity` cuts.
        """
        scored = scored_by(self.gate, inputs, shard)
        target, visible = self._target(inputs, shard, lse, scored)
        target = checkpoint_name(target, _KEPT)
        rows = {"loss": _block_choice.divergence(target, scored.scores, visible)}
        if self.options.chooses:
            scores = jax.lax.stop_gradient(scored.scores)
            chosen, overflow = choose(self.options, dataclasses.replace(scored, scores=scores))
            best = _block_choice.highest(
                target, scored.past, self.options.most_blocks(target.shape[-1]) - 1
            )
            rows["mass"] = _block_choice.fraction(target * chosen, target)
            rows["recall"] = _block_choice.fraction(best & chosen, best)
            rows["overflow"] = overflow
        return {name: jnp.mean(x, axis=1, dtype=jnp.float32) for name, x in rows.items()}

    def _dense(self, inputs: Inputs, shard: Shard) -> tuple[jax.Array, jax.Array]:
        """Dense attention [B, T, N, H], and its log-sum-exp [B, T, N]."""
        query, key, value = inputs.query, inputs.key, inputs.value
        mask = self._local_mask(query.shape[1], key.shape[1], query.shape[2], shard)
        kernel = self.options.implementation
        segment_ids = inputs.segment_ids
        return attend_blocks(self.config, kernel, query, key, value, mask, segment_ids, True)

    def _target(
        self, inputs: Inputs, shard: Shard, lse: jax.Array, scored: Scored
    ) -> tuple[jax.Array, jax.Array]:
        """What the gate is to say [B, n, M, J], and of which blocks."""
        is_prefill, size = self.options.gates == "prefill", self.options.block_size
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
            scale=self.config.scale,
            logits_soft_cap=self.config.attention_soft_cap,
            query_offset=shard.query_offset,
            group_reduction=None if is_prefill else "max",
        )
        if is_prefill:
            visible = scored.past | scored.own
            return _block_choice.shares_of(maxima, visible), visible
        return _block_choice.shares_of(maxima, scored.past, epsilon=1e-9), scored.past

    def _loss_of_tokens(self, rows: jax.Array, inputs: Inputs, shard: Shard) -> jax.Array:
        """Gives each token the loss of its row, so that the mean over tokens is that over rows."""
        num_keys = inputs.key.shape[1]
        options, size = self.options, self.options.block_size
        num_blocks = -(-num_keys // size)
        if options.gates == "prefill":
            skipped = size * int(num_blocks * options.loss_start)
            ids = inputs.segment_ids and inputs.segment_ids[0]
            losses = _pooled_blocks.of_tokens(rows, size, ids, inputs.query.shape[1])
        else:
            skipped, losses = int(num_keys * options.loss_start), rows
        place = shard.query_offset + jnp.arange(losses.shape[1])
        factor = options.loss_weight * num_keys / (num_keys - skipped)
        if options.loss_reduction == "element_mean":
            factor /= num_blocks
        return factor * jnp.where(place >= skipped, losses, 0)

    def _scored(self, inputs: Inputs, shard: Shard) -> Scored:
        """Rows with the scores of the selector."""
        scored = scored_by(self.gate, inputs, shard)
        if self.options.selector == "gate":
            return scored
        if self.options.selector == "oracle":
            _, lse = self._dense(inputs, shard)
            target, _ = self._target(inputs, shard, lse, scored)
            scores = jnp.log(jnp.maximum(target, jnp.finfo(target.dtype).tiny))
        elif self.options.selector == "mean_pooled":
            scores = mean_pooled(self.options, inputs)
        else:
            scores = jnp.arange(scored.scores.shape[-1], dtype=jnp.float32)
        scores = jnp.broadcast_to(scores, scored.scores.shape)
        return dataclasses.replace(scored, scores=scores)

    def _attend_chosen(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Attention to the chosen blocks, with their density and overflow."""
        if self.options.gates == "prefill":
            found = self._chosen_rows(inputs, shard)
        else:
            found = _query_chunks.mapped(self._chosen_rows, inputs, shard)
        num_queries, num_keys = inputs.query.shape[1], inputs.key.shape[1]
        # Of all pairs that as many queries have on average, so that the mean over equal parts of
        # a sequence is the density of the whole.
        pairs = jnp.sum(jnp.mean(found["pairs"], axis=0))
        density = pairs / (num_queries * (num_keys + 1) / 2)
        diagnostics = {"density": density, "overflow": jnp.mean(found["overflow"])}
        return AttentionOutput(found["output"], diagnostics=diagnostics)

    def _chosen_rows(self, inputs: Inputs, shard: Shard) -> dict[str, jax.Array]:
        """The same of queries, with pairs and overflow of their rows [B, M], means over heads."""
        chosen, overflow = choose(self.options, self._scored(inputs, shard))
        places = shard.query_offset + jnp.arange(inputs.query.shape[1])
        num_keys, size = inputs.key.shape[1], self.options.block_size
        most = self.options.most_blocks(chosen.shape[-1])
        capacity = None if self.options.dense_rows else most
        return {
            "output": self._attend_map(inputs, chosen, shard.query_offset, capacity),
            "pairs": _pooled_blocks.pairs(chosen, places, num_keys, size),
            "overflow": jnp.mean(overflow, axis=1, dtype=jnp.float32),
        }
