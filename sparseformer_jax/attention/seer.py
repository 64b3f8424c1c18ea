"""SeerAttention: gates that learn from a model's own dense attention which blocks it needs.

    target  p_mj = max of block (m, j) of the attention map / sum over j     (prefill)
            p_tj = max of block j of row t and of its group / sum over j     (decode, j before t's)
    loss    KL(p || softmax(gate scores)), of every layer
    then    attend to the blocks that the gate scores highest, and to the own block
    joint   do so in training too: weights learn from cross entropy, gates from the loss alone

Gao et al. 2024, "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv
2410.13276, and 2025, "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning", arXiv
2506.08889. In training the layer attends densely and its gate learns; what else is computed has no
gradient through the gate, so that with `train.trainable` naming gates alone nothing of the model
is differentiated. In evaluation and decoding the gate chooses, if the options say how many. Joint
training is that of the first version of 2410.13276: a hard choice has no gradient, and the target
comes from dense attention of the same queries and keys, without gradient.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from pallas_kernels.rules import Dense, Rule
from sparseformer_jax.attention import (
    _block_selection,
    _gate_cost,
    _gate_figures,
    _gates,
    _pooled_blocks,
    _query_chunks,
    dense,
    masformer,
)
from sparseformer_jax.attention._block_sparse import attend_blocks, check_implementation
from sparseformer_jax.attention._cost import Cost
from sparseformer_jax.attention._distillation import DistillationOptions, distilled, target_of, told
from sparseformer_jax.attention._gate_scores import Scored, mean_pooled, scored_by
from sparseformer_jax.attention._gated import GatedAttention
from sparseformer_jax.attention.base import Attention, AttentionOutput
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.figures import Shown
from sparseformer_jax.model.config import ModelConfig

if TYPE_CHECKING:  # of an extra
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Options(DistillationOptions):
    """Options of SeerAttention, beside those of its gates, of what they choose and how they learn.

    Attributes:
      window_size: tokens that a query sees in `window_layers`, itself counted.
      window_layers: the layers that attend to a window and have no gate, as the model does that
        gates learn from; `pretrained` sizes take them from it.
      implementation: of the kernel, see `block_sparse_attention`; None: the best here.
    """

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
        f"{type(other).__module__.rpartition('.')[2]!r}"
    )


def notes(options: Options) -> list[str]:
    """Returns what a run says of these options as it starts."""
    if options.gates == "prefill" and options.chooses:
        told = "training and perplexity" if options.joint else "perplexity"
        return [
            "attention.gates='prefill' is causal in whole blocks only: a block's queries choose "
            f"together, so {told} may profit from tokens of the same block that follow"
        ]
    return []


def sweep(options: Options, seq_len: int) -> list[dict[str, Any]]:
    """Returns options that attend to more and more of a sequence; the last are dense."""
    # Joint training must choose; how a run trains does not change what it evaluates to.
    return [found | {"joint": False} for found in _block_selection.sweep(options, seq_len)]


class Method(GatedAttention):
    """Dense attention beside a gate that learns from it, or attention to what the gate chooses."""

    detached: ClassVar[frozenset[str]] = frozenset({"gate"})
    by_layer: ClassVar[frozenset[str]] = frozenset(
        {"kl", "recall", "mass", "gate_density", "overflow"}
    )

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
        """Returns what attention costs, the gate with it; in training its target too."""
        options, config = self.options, self.config
        if not (is_training or options.chooses):
            return Cost(1.0)
        own = _gate_cost.gate_flops(options, config, seq_len, is_training=is_training)
        if not is_training:
            return Cost(self.density(seq_len), own)
        own += _gate_cost.target_flops(config, seq_len, has_lse=not options.joint)
        return Cost(self.density(seq_len) if options.joint else 1.0, own)

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns attention to what the gate chooses; in training with the gate's loss.

        Without keys to pool attention is dense, and so it is in training that is not joint.
        """
        if inputs.noise is not None:
            return self._attend_in_training(inputs, shard)
        if not self.options.chooses or inputs.unrotated_key is None:
            output = super().attend(inputs, shard).output
            return AttentionOutput(output, diagnostics={"density": jnp.ones(())})
        return self._attend_chosen(inputs, shard)

    def inspect(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        step: Any = 0,
    ) -> dict[str, Array]:
        """Returns what the gate says of blocks and what dense attention does, see `told`.

        Args:
          x: what the module is called with, as are the others.
          positions: of each token in its document.
          segment_ids: document of each token; None: one.
          step: of training.
        """
        shard = Shard(num_heads=self.config.num_heads)
        inputs = self._inputs(x, positions, segment_ids, None, step)
        _, lse = self._dense(inputs, shard)
        return told(self.gate, self.options, self.config, inputs, shard, lse)

    @classmethod
    def figures(cls, shown: Shown) -> Mapping[str, Sequence["Figure"]]:
        """Returns what gates say of blocks beside what is true, and how well, by layer."""
        return _gate_figures.draw(shown)

    def _attend_in_training(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Dense attention or, jointly, that to what the gate chooses, with the gate's loss."""
        options, dense_inputs = self.options, inputs
        if options.joint:
            arrays = (inputs.query, inputs.key, inputs.value)
            query, key, value = jax.lax.stop_gradient(arrays)
            dense_inputs = dataclasses.replace(inputs, query=query, key=key, value=value)
        output, lse = self._dense(dense_inputs, shard)
        loss, reports = distilled(self.gate, options, self.config, inputs, shard, lse)
        attended = (
            self._attend_chosen(inputs, shard)
            if options.joint
            else AttentionOutput(output, diagnostics={"density": jnp.ones(())})
        )
        diagnostics = reports | attended.diagnostics
        return dataclasses.replace(attended, losses={"gate": loss}, diagnostics=diagnostics)

    def _dense(self, inputs: Inputs, shard: Shard) -> tuple[jax.Array, jax.Array]:
        """Dense attention [B, T, N, H], and its log-sum-exp [B, T, N]."""
        query, key, value = inputs.query, inputs.key, inputs.value
        mask = self._local_mask(query.shape[1], key.shape[1], query.shape[2], shard)
        kernel = self.options.implementation
        segment_ids = inputs.segment_ids
        return attend_blocks(self.config, kernel, query, key, value, mask, segment_ids, True)

    def _scored(self, inputs: Inputs, shard: Shard) -> Scored:
        """Rows with the scores of the selector, in training those of the gate."""
        scored = scored_by(self.gate, inputs, shard)
        if self.options.selector == "gate" or inputs.noise is not None:
            return scored
        if self.options.selector == "oracle":
            _, lse = self._dense(inputs, shard)
            target, _ = target_of(self.options, self.config, inputs, shard, lse, scored)
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
        overflow = jnp.mean(found["overflow"])
        diagnostics = {"density": density, "gate_density": density, "overflow": overflow}
        return AttentionOutput(found["output"], diagnostics=diagnostics)

    def _chosen_rows(self, inputs: Inputs, shard: Shard) -> dict[str, jax.Array]:
        """The same of queries, with pairs and overflow of their rows [B, M], means over heads."""
        chosen, overflow = _block_selection.choose(self.options, self._scored(inputs, shard))
        places = shard.query_offset + jnp.arange(inputs.query.shape[1])
        num_keys, size = inputs.key.shape[1], self.options.block_size
        most = self.options.most_blocks(chosen.shape[-1])
        capacity = None if self.options.dense_rows else most
        return {
            "output": self._attend_map(inputs, chosen, shard.query_offset, capacity),
            "pairs": _pooled_blocks.pairs(chosen, places, num_keys, size),
            "overflow": jnp.mean(overflow, axis=1, dtype=jnp.float32),
        }
