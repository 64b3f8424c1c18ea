"""What every attention method shares: projections, rotary positions, sharding.

A method subclasses `Attention` and overrides `attend`, which sees local arrays only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from sparseformer_jax import mesh
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import Norm, Projection, residual_scale, rotary
from sparseformer_jax.model.read_only import read_only

# Segments of queries [B, T] and keys [B, S]; a query sees its own segment only.
SegmentIds = tuple[Int[Array, "B T"], Int[Array, "B S"]]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """Where the local arrays of `attend` lie in the whole sequence and among all heads.

    Attributes:
      query_offset: position of the first local query; keys always start at 0.
      head_offset: index of the first local query head.
      num_heads: query heads in all shards together.
    """

    query_offset: Any = 0
    head_offset: Any = 0
    num_heads: int = dataclasses.field(default=0, metadata={"static": True})


class Attention(nnx.Module):
    """Attention with grouped queries; a subclass says which keys each query attends to.

    A method overrides `attend` and `density`; `layer_kinds` if its layers differ.
    Parameters of its own are made after `super().__init__` and named with logical axes.
    """

    def __init__(self, config: ModelConfig, options: Any, *, rngs: nnx.Rngs) -> None:
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

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        segment_ids: SegmentIds | None,
        shard: Shard,
        rng: Key[Array, ""] | None,
    ) -> AttentionOutput:
        """Returns the attended values [B, T, N, H] of the local queries.

        Losses and diagnostics are means over the local tokens and heads, so that their
        mean over devices is that of the whole batch.

        Args:
          query: local queries, rotated.
          key: keys of the whole sequence, S >= T, for the local heads.
          value: their values.
          segment_ids: of queries and keys; a query sees its own segment only. None: all.
          shard: where the local queries lie.
          rng: randomness for training, None in evaluation.
        """
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        rng: Key[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Returns attention over x, projected back to the residual stream.

        Args:
          x: normalised residual stream.
          positions: of each token in its document, for the rotary embedding.
          segment_ids: document of each token; attention stays inside. None: one.
          rng: randomness for training, None in evaluation.
        """
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.position == "rope":
            query = rotary(query, positions, self.config.rope_theta)
            key = rotary(key, positions, self.config.rope_theta)
        if mesh.is_active():
            attended = self._attend_sharded(query, key, value, segment_ids, rng)
        else:
            whole = Shard(num_heads=self.config.num_heads)
            ids = None if segment_ids is None else (segment_ids, segment_ids)
            attended = self.attend(query, key, value, ids, whole, rng)
        output = self.out(attended.output)
        return AttentionOutput(output, attended.losses, attended.diagnostics)

    def _attend_sharded(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        rng: jax.Array | None,
    ) -> AttentionOutput:
        """Runs `attend` on each device's queries and heads, keys gathered over `context`."""
        query_spec = mesh.spec("batch", "seq", "heads", None)
        key_spec = mesh.spec("batch", None, "kv_heads", None)
        key, value = jax.reshard(key, key_spec), jax.reshard(value, key_spec)
        ids, ids_spec = None, None
        if segment_ids is not None:
            ids_spec = (mesh.spec("batch", "seq"), mesh.spec("batch", None))
            ids = (segment_ids, jax.reshard(segment_ids, ids_spec[1]))
        graphdef, state = nnx.split(self)
        state, state_spec = _gather_parameters(state)

        def local(
            state: Any, query: Any, key: Any, value: Any, ids: Any, rng: Any
        ) -> AttentionOutput:
            shard = Shard(
                query_offset=_axis_index("context") * query.shape[1],
                head_offset=_axis_index("tensor") * query.shape[2],
                num_heads=self.config.num_heads,
            )
            module = nnx.merge(graphdef, state)
            with read_only(module):
                attended = module.attend(query, key, value, ids, shard, rng)
            means = jax.lax.pmean((attended.losses, attended.diagnostics), mesh.AXES)
            return AttentionOutput(attended.output, *means)

        replicated = PartitionSpec()
        return jax.shard_map(
            local,
            in_specs=(state_spec, query_spec, key_spec, key_spec, ids_spec, replicated),
            out_specs=AttentionOutput(query_spec, replicated, replicated),
            check_vma=False,  # kernels inside are custom calls, which carry no such types
        )(state, query, key, value, ids, rng)


def _axis_index(axis: str) -> int | jax.Array:
    """This device's index along a mesh axis, static where the axis does not divide."""
    size = jax.sharding.get_abstract_mesh().shape[axis]
    return jax.lax.axis_index(axis) if size > 1 else 0


def _gather_parameters(state: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters whole along `embed` and the partition of each."""

    def gathered(variable: nnx.Variable) -> PartitionSpec:
        return mesh.spec(*mesh.gathered_axes(variable.get_metadata("axes")))

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    specs = jax.tree.map(gathered, state, is_leaf=is_variable)
    pure = nnx.as_pure(state)
    return jax.tree.map(jax.reshard, pure, nnx.as_pure(specs)), specs
