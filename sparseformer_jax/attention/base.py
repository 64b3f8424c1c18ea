"""What every attention method shares: projections, rotary positions, sharding.

A method subclasses `Attention` and overrides `attend`, which sees local arrays only.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from sparseformer_jax import mesh
from sparseformer_jax.attention import _cache, _one_hot, _reports, _sharding
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention._cost import Cost
from sparseformer_jax.attention.inputs import ON_DEMAND, Inputs, Noise, Shard, local_noise
from sparseformer_jax.figures import Shown
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import Norm, Projection, residual_scale
from sparseformer_jax.model.rotary import rotary

if TYPE_CHECKING:  # of an extra
    from matplotlib.figure import Figure


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What a method returns.

    Attributes:
      output: attended values, [B, T, N, H] from `attend`, [B, T, D] from the module.
      losses: auxiliary losses by name, their coefficient included: of each token [B, T] from
        `attend`; from the module their sum over tokens, each times its weight.
      diagnostics: numbers to look at by name, scalars.
      statistics: sums over tokens by name, from which `update` makes new variables; from the
        module in training only.
    """

    # Any: JAX also builds it of partitions and shapes.
    output: Any
    losses: Any = dataclasses.field(default_factory=dict)
    diagnostics: Any = dataclasses.field(default_factory=dict)
    statistics: Any = dataclasses.field(default_factory=dict)


class Attention(nnx.Module):
    """Attention with grouped queries; a subclass says which keys each query attends to.

    A method overrides `attend` and `density`; `layer_kinds` if its layers differ; `cost` if it
    computes more than that; `inspect` and `figures` where it has pictures of its own.
    Parameters of its own are made after `super().__init__` and named with logical axes, and
    so are variables that no gradient moves, which are of a subclass of `nnx.Variable`. What
    those learn from, `attend` returns as statistics; `update` runs once a step.

    Attributes:
      needs: what `attend` reads of `inputs.ON_DEMAND`; the rest is not handed over.
      gathers_keys: whether `attend` sees the keys of the whole sequence. If not it sees those
        of its own part, and gathers what it makes of them by `shard.gather`.
      statistics_axes: the statistics by name, with the logical axis of each dimension.
      cache_axes: of what else than `Inputs` the cache holds, the same without that of layers.
      detached: own modules that learn from the method's losses alone and pass no gradient on;
        where only those train, nothing else has a backward pass.
      by_layer: diagnostics of names of its own that are logged layer by layer too.

    Raises:
      ValueError: `needs` names anything else.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gathers_keys: ClassVar[bool] = True
    statistics_axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    cache_axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    detached: ClassVar[frozenset[str]] = frozenset()
    by_layer: ClassVar[frozenset[str]] = frozenset()

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

    def cost(self, seq_len: int, *, is_training: bool) -> Cost:
        """Returns what attention over a sequence costs, in training or in evaluation."""
        return Cost(self.density(seq_len))

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns the attended values [B, T, N, H] of the local queries.

        Losses are of each local query [B, T]. Statistics are sums over the local queries, or
        over the keys at their places, which `inputs.weights` weighs. Both are means over the
        local heads, where `statistics_axes` names none; diagnostics are means over local tokens
        and heads. So they come to those of the whole batch.

        Args:
          inputs: what this device sees of the layer.
          shard: where that lies in the whole.
        """
        raise NotImplementedError

    @classmethod
    def update(
        cls, options: Any, variables: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns the layer's variables after a step, those that change.

        It runs after the optimiser, whatever the mesh, accumulation and remat.

        Args:
          options: of the layer.
          variables: of the layer, but for parameters, by their paths in this module.
          statistics: of the layer's whole batch.
        """
        return {}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        weights: Float[Array, "B T"] | None = None,
        *,
        step: Any = 0,
        rng: Key[Array, ""] | None = None,
    ) -> AttentionOutput:
        """Returns attention over x, projected back to the residual stream.

        Args:
          x: normalised residual stream.
          positions: of each token in its document, for the rotary embedding.
          segment_ids: document of each token; attention stays inside. None: one.
          weights: of each token in losses and statistics; None: 1.
          step: of training, a scalar, for what follows a schedule.
          rng: randomness for training, None in evaluation.
        """
        inputs = self._inputs(x, positions, segment_ids, weights, step)
        if mesh.is_active():
            attended = self._attend_sharded(inputs, rng)
        else:
            noise = None if rng is None else Noise(rng)
            attended = self._attend(inputs, noise, Shard(num_heads=self.config.num_heads))
        statistics = {} if rng is None else attended.statistics
        return dataclasses.replace(
            attended, output=self.out(attended.output), statistics=statistics
        )

    def init_cache(self, batch_size: int, size: int, num_layers: int = 1) -> Cache:
        """Returns the empty cache of so many sequences of at most `size` tokens.

        A method that may forget tokens overrides it, as `RuleAttention` does. Layers share arrays.
        """
        names = _cache.fields(self.needs, gathers_keys=self.gathers_keys)
        return _cache.empty(names, self.config, (num_layers, batch_size, size))

    def decode(
        self,
        x: Float[Array, "B T D"],
        start: Int[Array, " B"],
        cache: Cache,
        lengths: Int[Array, " B"] | None = None,
        *,
        layer: Any = 0,
        step: Any = 0,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Returns attention of the next tokens of each sequence over all before, and the cache.

        Equal to what `__call__` returns for these tokens as a part of the whole sequence, if
        the method is causal. Those of several devices share sequences by batch and heads only.

        Args:
          x: normalised residual stream of T tokens a sequence.
          start: position of the first of them.
          cache: of the tokens before; it has room for these.
          lengths: tokens of each sequence that count; later ones start in place of the others,
            which weigh 0. None: all.
          layer: which of the layers that share it this is.
          step: of training.
        """
        positions = start[:, None] + jnp.arange(x.shape[1])
        inputs = self._inputs(x, positions, None, _cache.weights(x, lengths), step)
        if mesh.is_active():
            output, cache = self._decode_sharded(inputs, start, cache, layer)
        else:
            shard = Shard(num_heads=self.config.num_heads)
            output, cache = self._decode(inputs, start, cache, layer, shard)
        return self.out(output), cache

    def weights_by_kind(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        step: Any = 0,
    ) -> dict[str, Float[Array, "B N T T"]]:
        """Returns the weight that every token gives every token, by how it comes to it.

        For tests and pictures, without a mesh and at small sizes: it holds all T^2 of them. A
        method that comes to tokens in more than one way overrides it; the kinds add up to
        `effective_attention`.

        Args:
          x: what the module is called with, as are the others.
          positions: of each token in its document.
          segment_ids: document of each token; None: one.
          step: of training.
        """
        shard = Shard(num_heads=self.config.num_heads)
        inputs = self._inputs(x, positions, segment_ids, None, step)
        return _one_hot.weights(
            inputs, lambda inputs: {"attended": self.attend(inputs, shard).output}
        )

    def inspect(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        step: Any = 0,
    ) -> dict[str, Array]:
        """Returns what `figures` draws of a layer, arrays [B, ..] by name; like `weights_by_kind`.

        Args:
          x: what the module is called with, as are the others.
          positions: of each token in its document.
          segment_ids: document of each token; None: one.
          step: of training.
        """
        return {}

    @classmethod
    def figures(cls, shown: Shown) -> Mapping[str, Sequence["Figure"]]:
        """Returns the pages of the method's own pictures by name, besides those of any method.

        Args:
          shown: what `inspect` says of the layers, and what the run has logged.
        """
        return {}

    def effective_attention(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B N T T"]:
        """Returns the weight that every token gives every token, `weights_by_kind` together.

        Args:
          x: what the module is called with.
          positions: of each token in its document; None: all are one document.
          segment_ids: document of each token; None: there is one.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        kinds = self.weights_by_kind(x, positions, segment_ids)
        return functools.reduce(jnp.add, kinds.values())

    def _inputs(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        weights: jax.Array | None,
        step: Any,
    ) -> Inputs:
        """Projects and rotates; of all tokens and heads."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        on_demand = {"x": x, "unrotated_query": query, "unrotated_key": key}
        if self.config.position == "rope":
            query = rotary(query, positions, self.config)
            key = rotary(key, positions, self.config)
        if weights is None:
            weights = jnp.ones_like(positions, jnp.float32)
        return Inputs(
            query,
            key,
            value,
            weights=(weights, weights),
            positions=(positions, positions),
            segment_ids=None if segment_ids is None else (segment_ids, segment_ids),
            step=jnp.asarray(step),
            **{name: on_demand[name] for name in self.needs},
        )

    def _attend(self, inputs: Inputs, noise: Noise | None, shard: Shard) -> AttentionOutput:
        """Runs `attend`, and sums its losses over the local tokens."""
        attended = self.attend(dataclasses.replace(inputs, noise=noise), shard)
        return dataclasses.replace(
            attended,
            losses=_reports.weighed(attended.losses, inputs.weights[0]),
            statistics=_reports.checked(self.statistics_axes, attended.statistics),
        )

    def _decode(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any, shard: Shard
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Writes keys and values of the local rows and heads, then attends to all of a row."""
        cache = _cache.write(cache, inputs, start, layer)
        seen = _cache.read(cache, inputs, start, layer)
        return self._attend_rows(seen, start, inputs.query.shape[1], shard), cache

    def _attend_rows(self, seen: Inputs, start: jax.Array, length: int, shard: Shard) -> jax.Array:
        """Attends, row by row, to its keys from so many queries that start anywhere among them."""

        def row(inputs: Inputs, start: jax.Array) -> jax.Array:
            inputs = jax.tree.map(lambda x: x[None] if x.ndim else x, inputs)
            if not self.gathers_keys:
                attended = self.attend(inputs, shard).output[0]
                return jax.lax.dynamic_slice_in_dim(attended, start, length)
            return self.attend(inputs, dataclasses.replace(shard, query_offset=start)).output[0]

        axes = jax.tree.map(lambda x: 0 if x.ndim else None, seen)
        return jax.vmap(row, (axes, 0))(seen, start)

    def _decode_sharded(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Runs `_decode` on each device's rows and heads."""
        start_spec, all_have = mesh.spec("batch"), PartitionSpec()
        cache_spec = _cache.partition(cache, self.cache_axes)

        def local(
            module: "Attention", inputs: Inputs, shard: Shard, start: Any, cache: Cache, layer: Any
        ) -> tuple[jax.Array, Cache]:
            return module._decode(inputs, start, cache, layer, shard)

        return _sharding.over_devices(
            self,
            local,
            inputs,
            jax.reshard(start, start_spec),
            jax.tree.map(jax.reshard, cache, cache_spec),
            jnp.asarray(layer),
            other_specs=(start_spec, cache_spec, all_have),
            out_specs=lambda query_spec: (query_spec, cache_spec),
        )

    def _attend_sharded(self, inputs: Inputs, rng: jax.Array | None) -> AttentionOutput:
        """Runs `attend` on each device's queries and heads, and sums over devices."""
        sums_spec = {name: mesh.spec(*axes) for name, axes in self.statistics_axes.items()}

        def local(module: "Attention", inputs: Inputs, shard: Shard, rng: Any) -> AttentionOutput:
            attended = module._attend(inputs, None if rng is None else local_noise(rng), shard)
            losses = jax.lax.psum(attended.losses, _sharding.TOKEN_AXES)
            statistics = attended.statistics.items()
            return AttentionOutput(
                attended.output,
                jax.lax.pmean(losses, _sharding.HEAD_AXES),
                jax.lax.pmean(attended.diagnostics, mesh.AXES),
                {name: _sharding.summed(x, sums_spec[name]) for name, x in statistics},
            )

        all_have = PartitionSpec()
        return _sharding.over_devices(
            self,
            local,
            inputs,
            rng,
            other_specs=(all_have,),
            out_specs=lambda query: AttentionOutput(query, all_have, all_have, sums_spec),
        )
