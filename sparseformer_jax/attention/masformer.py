"""MASFormer: full attention in a few layers, a short span in all others.

    attend_l(i, j) <=> j <= i and (l in full_layers or short(i, j))
    short: block               floor(i/b) = floor(j/b)
           block_and_previous  floor(i/b) - floor(j/b) <= 1
           window              i - j < w

Zhang et al. 2023, "Efficient Long-Range Transformers: You Need to Attend More, but Not
Necessarily at Every Layer", arXiv 2310.12442. Block spans need no sparse kernel: blocks
become rows of the batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped
from ml_collections import ConfigDict

from pallas_kernels import BlockMask
from pallas_kernels.rules import Dense, Local, Rule
from sparseformer_jax.attention import dense
from sparseformer_jax.attention._block_sparse import check_implementation
from sparseformer_jax.attention._by_rule import RuleAttention
from sparseformer_jax.attention.base import Attention, AttentionOutput
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.checks import ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of MASFormer.

    Attributes:
      span: of the other layers: "block", "block_and_previous" or "window".
      span_size: b or w, in tokens.
      num_full_layers: the bottom layers attend fully.
      full_layers: the layers that do instead, by index; None: the bottom ones.
      implementation: of the kernel, see `block_sparse_attention`; None: the best here.
    """

    span: Literal["block", "block_and_previous", "window"] = "block"
    span_size: int = 256
    num_full_layers: int = 1
    full_layers: tuple[int, ...] | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.span_size < 1:
            raise ValueError(f"span_size={self.span_size} must be at least 1")
        if self.num_full_layers < 0:
            raise ValueError(f"num_full_layers={self.num_full_layers} must not be negative")

    @property
    def full(self) -> frozenset[int]:
        """The layers that attend fully."""
        layers = range(self.num_full_layers) if self.full_layers is None else self.full_layers
        return frozenset(layers)


def check(options: Options, config: ConfigDict) -> None:
    """Refuses what the model cannot do with these options.

    Raises:
      ValueError: implementation is unknown, a full layer does not exist, or the model is
        not causal.
    """
    check_implementation(options.implementation)
    num_layers = config.model.num_layers
    outside = sorted(layer for layer in options.full if not 0 <= layer < num_layers)
    if outside and options.full_layers is None:
        raise ValueError(
            f"num_full_layers={options.num_full_layers} is more than model.num_layers={num_layers}"
        )
    if outside:
        raise ValueError(
            f"full_layers={options.full_layers} names {outside}; "
            f"the layers are 0 to {num_layers - 1}"
        )
    if not config.model.is_causal:
        raise ValueError("name='masformer' is a decoder's; set model.is_causal=True")


class Method(RuleAttention):
    """MASFormer's short-span attention."""

    @classmethod
    def layer_kinds(
        cls, options: Options, num_layers: int
    ) -> Sequence[tuple[type[Attention], Any]]:
        """Returns dense attention in the full layers, the short span in the others."""
        dense_kind = (dense.Method, dense.Options(options.implementation))
        return [
            dense_kind if layer in options.full else (cls, options) for layer in range(num_layers)
        ]

    def rule(self) -> Rule:
        """Returns the blocks of the span; for a window, its limit in tokens says all."""
        size = self.options.span_size
        if self.options.span == "window":
            return Dense()
        return Local(size, left=1 if self.options.span == "block" else 2)

    @property
    def window_size(self) -> int | None:
        """The window, in tokens."""
        return self.options.span_size if self.options.span == "window" else None

    @property
    def span(self) -> int:
        """The tokens of the span, in the block before too where it is seen."""
        blocks = 2 if self.options.span == "block_and_previous" else 1
        return blocks * self.options.span_size

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns attention over the span, with its density."""
        query, key, value, segment_ids = (
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.segment_ids,
        )
        size, num_queries, num_keys = self.options.span_size, query.shape[1], key.shape[1]
        is_anywhere = num_queries < num_keys and not shard.seq_axes
        if self.options.span != "block" or is_anywhere:
            return super().attend(inputs, shard)
        if num_queries < num_keys:
            if num_queries % size:
                raise ConfigError(
                    f"mesh.context leaves {num_queries} queries to a device, which spans of "
                    f"{size} tokens do not divide; take fewer devices or smaller spans"
                )
            # Whole blocks are local: their keys are all a device's queries see.
            own = functools.partial(
                jax.lax.dynamic_slice_in_dim,
                start_index=shard.query_offset,
                slice_size=num_queries,
                axis=1,
            )
            key, value = own(key), own(value)
            segment_ids = segment_ids and (segment_ids[0], own(segment_ids[1]))
        size = min(size, num_queries)
        fold = functools.partial(_fold, size=size)
        output = self._attend_blocks(
            fold(query),
            fold(key),
            fold(value),
            BlockMask.from_rule(self.rule(), size, is_causal=True),
            jax.tree.map(fold, segment_ids),
        )
        output = output.reshape(query.shape[0], -1, *query.shape[2:])[:, :num_queries]
        return AttentionOutput(output, diagnostics=self._diagnostics(num_keys))


def _fold(x: Shaped[Array, "B T ..."], size: int) -> Shaped[Array, "blocks size ..."]:
    """Makes blocks rows of the batch. Padding stands last, where causality hides it."""
    padding = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(-1, size, *x.shape[2:])
