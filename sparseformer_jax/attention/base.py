"""What every attention method shares: projections, rotary positions, sharding.

A method subclasses `Attention` and overrides `attend`, which sees local arrays only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from sparseformer_jax import mesh
from sparseformer_jax.attention.inputs import (
    ON_DEMAND,
    Inputs,
    Noise,
    Shard,
    local_noise,
    local_shard,
    partition,
)
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import Norm, Projection, residual_scale, rotary
from sparseformer_jax.model.read_only import read_only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What a method returns.

    Attributes:
      output: attended values, [B, T, N, H] from `attend`, [B, T, D] from the module.
      losses: auxiliary losses by name, scalars already weighted.
      diagnostics: numbers to look at by name, scalars.
    """

    # Any: JAX also builds it of partitions and shapes.
    output: Any
    losses: Any = dataclasses.field(default_factory=dict)
    diagnostics: Any = dataclasses.field(default_factory=dict)


class Attention(nnx.Module):
    """Attention with grouped queries; a subclass says which keys each query attends to.

    A method overrides `attend` and `density`; `layer_kinds` if its layers differ.
    Parameters of its own are made after `super().__init__` and named with logical axes.

    Attributes:
      needs: what `attend` reads of `inputs.ON_DEMAND`; the rest is not handed over.

    Raises:
      ValueError: `needs` names anything else.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: ModelConfig, options: Any, *, rngs: nnx.Rngs) -> None:
        if not self.needs <= ON_DEMAND:
            raise ValueError(
                f"{type(self).__name__}.needs={sorted(self.needs)}: take from {sorted(ON_DEMAND)}"
            )
        self.config = config
        self.options = options
        heads = (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        embed = (config.embed_dim,)
        bias = config.qkv_bias
        axes = ("embed", "heads", "head_dim")
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.query = Projection(embed, heads, axes, config, use_bias=bias, rngs=rngs)
        self.key = Projection(embed, kv_heads, kv_axes, config, use_bias=bias, rngs=rngs)
        self.value = Projection(embed, kv_heads, kv_axes, config, use_bias=bias, rngs=rngs)
        self.out = Projection(
            heads,
            embed,
            ("heads", "head_dim", "embed"),
            config,
            use_bias=config.out_bias,
            init_scale=residual_scale(config),
            rngs=rngs,
        )
        self.query_norm = Norm(config.head_dim, "rmsnorm", config) if config.qk_norm else None
        self.key_norm = Norm(config.head_dim, "rmsnorm", config) if config.qk_norm else None

    @classmethod
    def layer_kinds(cls, options: Any, num_layers: int) -> Sequence[tuple[type["Attention"], Any]]:
        """Returns the class and options of each layer; equal neighbours share one scan."""
        return [(cls, options)] * num_layers

    def density(self, seq_len: int) -> float:
        """Returns the attended fraction of the (causal) query-key pairs of a sequence."""
        raise NotImplementedError

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns the attended values [B, T, N, H] of the local queries.

        Losses and diagnostics are means over the local tokens and heads, so that their
        mean over devices is that of the whole batch.

        Args:
          inputs: what this device sees of the layer.
          shard: where that lies in the whole.
        """
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        step: Any = 0,
        rng: Key[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Returns attention over x, projected back to the residual stream.

        Args:
          x: normalised residual stream.
          positions: of each token in its document, for the rotary embedding.
          segment_ids: document of each token; attention stays inside. None: one.
          step: of training, a scalar, for what follows a schedule.
          rng: randomness for training, None in evaluation.
        """
        inputs = self._inputs(x, positions, segment_ids, step)
        if mesh.is_active():
            attended = self._attend_sharded(inputs, rng)
        else:
            noise = None if rng is None else Noise(rng)
            whole = Shard(num_heads=self.config.num_heads)
            attended = self.attend(dataclasses.replace(inputs, noise=noise), whole)
        output = self.out(attended.output)
        return AttentionOutput(output, attended.losses, attended.diagnostics)

    def _inputs(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array | None, step: Any
    ) -> Inputs:
        """Projects and rotates; of all tokens and heads."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        on_demand = {"x": x, "unrotated_query": query, "unrotated_key": key}
        if self.config.position == "rope":
            query = rotary(query, positions, self.config.rope_theta)
            key = rotary(key, positions, self.config.rope_theta)
        return Inputs(
            query,
            key,
            value,
            positions=(positions, positions),
            segment_ids=None if segment_ids is None else (segment_ids, segment_ids),
            step=jnp.asarray(step),
            **{name: on_demand[name] for name in self.needs},
        )

    def _attend_sharded(self, inputs: Inputs, rng: jax.Array | None) -> AttentionOutput:
        """Runs `attend` on each device's queries and heads, keys gathered over `context`."""
        inputs_spec = partition(inputs)
        inputs = jax.tree.map(jax.reshard, inputs, inputs_spec)
        graphdef, state = nnx.split(self)
        state, state_spec = _gather_parameters(state)

        def local(state: Any, inputs: Inputs, rng: Any) -> AttentionOutput:
            noise = None if rng is None else local_noise(rng)
            shard = local_shard(inputs, self.config.num_heads)
            module = nnx.merge(graphdef, state)
            with read_only(module):
                attended = module.attend(dataclasses.replace(inputs, noise=noise), shard)
            means = jax.lax.pmean((attended.losses, attended.diagnostics), mesh.AXES)
            return AttentionOutput(attended.output, *means)

        replicated = PartitionSpec()
        return jax.shard_map(
            local,
            in_specs=(state_spec, inputs_spec, replicated),
            out_specs=AttentionOutput(inputs_spec.query, replicated, replicated),
            check_vma=False,  # kernels inside are custom calls, which carry no such types
        )(state, inputs, rng)


def _gather_parameters(state: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters whole along `embed` and the partition of each."""

    def gathered(variable: nnx.Variable) -> PartitionSpec:
        return mesh.spec(*mesh.gathered_axes(variable.get_metadata("axes")))

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    specs = jax.tree.map(gathered, state, is_leaf=is_variable)
    pure = nnx.as_pure(state)
    return jax.tree.map(jax.reshard, pure, nnx.as_pure(specs)), specs
