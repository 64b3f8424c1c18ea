"""Routing Transformer: some heads attend inside learned clusters of tokens, others nearby.

With u_i = LayerNorm(W x_i) without scale and shift, and centroids m_c of each routed head:

    cluster(i) = argmax_c u_i . m_c
    attend(i, j) <=> j is one of the last w members of cluster(i) up to i, in its document

    out_i = sum_j softmax_j(scale u_i . u_j) v_j,  loss_i = 2 beta |u_i - m_cluster(i)|^2 / H

Centroids follow the mean of their members. Local heads see their own block and those before.
All heads' outputs pass one shared H x H matrix before the output projection.

Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers",
arXiv 2003.05997, and its code in google-research. What differs, by default:

- `selection="causal"` as above. The authors' is `selection="paper"`, which is **not strictly
  causal**: every centroid takes its w highest scores of the whole sequence, so later tokens
  decide whether an earlier one is taken. One taken by no centroid gets 0, by several their mean.
- Logits are scaled as in any attention, by 1/sqrt(H), and a token sees itself only where it has
  no mates. As u_i . u_i = H is the largest logit there is, the authors' (logit_scale=1,
  masks_self=False) start with nearly all weight on the token itself, and learn recall slowly.
- Counts are kept for each head and start even, see `_clusters.moved`; theirs mix heads up.
- The shared vector is the key's projection, which a device and a cache have of all tokens.
- Routed heads are spread evenly among all, so that `mesh.tensor` gives each device as many.
- The shared matrix starts as the identity.

As a layer of its own, whose centroids `Method.update` moves once a step:

    >>> sizes = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
    >>> config = ModelConfig(vocab_size=1, num_layers=1, mlp_dim=1, **sizes)
    >>> options = Options(num_clusters=4, window_size=8, block_size=8)
    >>> attention = Method(config, options, rngs=nnx.Rngs(0))
    >>> attention(jnp.ones((2, 64, 32)), jnp.mgrid[:2, :64][1], None).output.shape
    (2, 64, 32)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from pallas_kernels.rules import Local, Rule
from sparseformer_jax.attention import _clusters, _nearby, _routed_figures, _routed_heads
from sparseformer_jax.attention._block_sparse import BlockSparseAttention, check_implementation
from sparseformer_jax.attention._routed_layers import (
    LocalQueries,
    NoQueries,
    Relative,
    SharedOutput,
)
from sparseformer_jax.attention.base import AttentionOutput
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.figures import Shown
from sparseformer_jax.model.config import ModelConfig

if TYPE_CHECKING:  # of an extra
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the Routing Transformer.

    Attributes:
      num_routed_heads: R; None: half of the heads; 0: none, local heads alone.
      num_clusters: C, centroids of a routed head. With T / w of them, work grows as T w + T C.
      window_size: w, tokens a query sees in its cluster, or with "paper" a cluster's tokens.
      selection: "causal", or the authors' "paper", which is not strictly causal.
      share_qk: routed heads have one vector for query and key, as is usual for a decoder.
      masks_self: a token sees itself in its cluster only where it sees no other.
      logit_scale: of routed heads; None: as the model's, 1/sqrt(H). The authors' is 1.
      commitment: beta, weight of the loss that draws vectors to their centroids.
      decay: of the centroids' moving average, a step.
      centroid_update: "mean", "released", "paper" or "frozen", see `_clusters.moved`.
      routed_relative: m of the embeddings of relative ranks in a cluster; 0: there are none.
      block_size: tokens in a block of the local heads.
      local_blocks: blocks they see, a query's own counted; as many ahead if not causal.
      local_relative: m of the embeddings of relative positions in local heads; 0: none.
      implementation: of the local heads' kernel, see `block_sparse_attention`; None: the best.
    """

    num_routed_heads: int | None = None
    num_clusters: int = 16
    window_size: int = 64
    selection: Literal["causal", "paper"] = "causal"
    share_qk: bool = True
    masks_self: bool = True
    logit_scale: float | None = None
    commitment: float = 1e-4
    decay: float = 0.999
    centroid_update: _clusters.Update = "mean"
    routed_relative: int = 0
    block_size: int = 64
    local_blocks: int = 2
    local_relative: int = 0
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_clusters", "window_size", "block_size", "local_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_routed_heads", "routed_relative", "local_relative", "commitment"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} must be from 0 to 1")
        if self.logit_scale is not None and not 1e-6 <= self.logit_scale <= 1e3:
            raise ValueError(f"logit_scale={self.logit_scale} must be from 1e-6 to 1,000")
        if self.commitment > 1e3:
            raise ValueError(f"commitment={self.commitment} must be at most 1,000")
        if self.local_relative and self.implementation:
            raise ValueError(
                f"implementation={self.implementation!r} has no embeddings of positions; set "
                "local_relative=0 or leave it out"
            )

    def routed(self, num_heads: int) -> int:
        """Returns R for a model of so many heads."""
        return num_heads // 2 if self.num_routed_heads is None else self.num_routed_heads


def check(options: Options, config: ConfigDict) -> None:
    """Refuses what the model cannot do with these options.

    Raises:
      ValueError: implementation is unknown, heads do not divide into routed and local ones or
        among devices, the sequence holds fewer tokens than a cluster, or the selection asks
        for something else than the model is.
    """
    check_implementation(options.implementation)
    model, devices, seq_len = config.model, config.mesh, config.data.seq_len
    routed = options.routed(model.num_heads)
    _check_heads(options, model)
    for kind, heads in (("routed", routed), ("local", model.num_heads - routed)):
        if heads % devices.tensor:
            raise ValueError(
                f"num_routed_heads={routed} leaves {heads} {kind} heads, which mesh.tensor="
                f"{devices.tensor} does not divide; make both kinds a multiple of it"
            )
    for name in ("num_clusters", "window_size"):
        if routed and getattr(options, name) > seq_len:
            raise ValueError(
                f"{name}={getattr(options, name)} is more than data.seq_len={seq_len}; take at "
                f"most {seq_len}"
            )
    if not options.share_qk and devices.context > 1:
        raise ValueError(
            f"share_qk=False needs all queries on a device; set mesh.context={devices.context} to 1"
        )


def _check_heads(options: Options, model: Any) -> None:
    """Refuses what a model, of `ModelConfig` or `config.model`, cannot do whatever its length."""
    routed = options.routed(model.num_heads)
    if routed > model.num_heads:
        raise ConfigError(
            f"num_routed_heads={routed} is more than model.num_heads={model.num_heads}; take at "
            f"most {model.num_heads}"
        )
    if routed and model.num_kv_heads != model.num_heads:
        raise ConfigError(
            f"num_routed_heads={routed}: routed heads have keys of their own; make model."
            f"num_kv_heads={model.num_kv_heads} model.num_heads={model.num_heads}"
        )
    if model.qk_norm and options.share_qk and routed == model.num_heads:
        raise ConfigError(
            f"num_routed_heads={routed} leaves no queries to model.qk_norm=True; set it to False"
        )
    if options.selection == "causal" and not (model.is_causal and options.share_qk):
        raise ConfigError(
            "selection='causal' is a decoder's, with share_qk=True; set selection='paper' for an "
            "encoder or for separate queries and keys"
        )


def notes(options: Options) -> list[str]:
    """Returns what a run says of these options as it starts."""
    if options.selection == "paper":
        return [
            "attention.selection='paper' is not strictly causal: clusters are chosen from the "
            "whole sequence, so losses may profit from tokens that sampling has not drawn yet"
        ]
    return []


class Centroids(nnx.Variable):
    """What routing learns without gradients: centroids, and what they are the average of."""


class Method(BlockSparseAttention):
    """The attention of the Routing Transformer: routed heads among local ones."""

    needs: ClassVar[frozenset[str]] = frozenset({"unrotated_query", "unrotated_key"})
    statistics_axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "counts": ("heads", None, None),
        "sums": ("heads", None, None, None),
    }

    def __init__(self, config: ModelConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        _check_heads(options, config)
        super().__init__(config, options, rngs=rngs)
        routed = options.routed(config.num_heads)
        local = config.num_heads - routed
        self.out = SharedOutput(config, rngs=rngs)
        if routed and options.share_qk:
            # Any: without local heads there is nothing to project.
            self.query: Any = LocalQueries(local, config, rngs=rngs) if local else NoQueries(config)
        if routed and options.routed_relative:
            self.routed_relative = Relative(options.routed_relative, config, rngs=rngs)
        if local and options.local_relative:
            self.local_relative = Relative(options.local_relative, config, rngs=rngs)
        if not routed:
            return
        shape = (routed, options.num_clusters, config.head_dim)
        axes = ("heads", None, "head_dim")
        centroids = _clusters.initial(rngs.params(), shape)
        self.centroids = Centroids(centroids, axes=axes)
        if options.centroid_update in ("mean", "released"):
            starts_even = options.centroid_update == "mean"  # then the first update makes both
            self.counts = Centroids(jnp.zeros(shape[:2]), axes=axes[:2])
            self.sums = Centroids(centroids * (not starts_even), axes=axes)

    @classmethod
    def update(
        cls, options: Options, variables: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns the centroids after a step: by the queries, then by the keys if those differ."""
        if "centroids" not in variables:  # there are no routed heads
            return {}
        return _clusters.moved(options.centroid_update, options.decay, variables, **statistics)

    def rule(self) -> Rule:
        """Returns the rule of the local heads."""
        blocks = self.options.local_blocks
        return Local(self.options.block_size, left=blocks, right=blocks)

    def density(self, seq_len: int) -> float:
        """Returns the fraction of pairs that local heads and clusters of equal size attend to.

        The diagnostic of that name is of the clusters there were. Both take a sequence for one
        document, and count a pair as often as clusters hold it.
        """
        num_heads, num_clusters = self.config.num_heads, self.options.num_clusters
        routed = self.options.routed(num_heads)
        even = jnp.full(num_clusters, seq_len / num_clusters)
        total = (
            routed
            * float(_routed_heads.density(self.options, even, seq_len, self.config.is_causal))
            if routed
            else 0.0
        )
        if routed < num_heads:
            total += (num_heads - routed) * super().density(seq_len)
        return total / num_heads

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns attention in clusters and nearby, commitment loss and the clusters' sums."""
        num_heads, num_keys = inputs.key.shape[2], inputs.key.shape[1]
        # Contiguous shards of heads all start alike, as mesh.tensor divides both kinds.
        kind = _is_routed(self.config.num_heads, self.options.routed(self.config.num_heads))
        routed, local = (np.flatnonzero(is_kind[:num_heads]) for is_kind in (kind, ~kind))
        if len(routed):
            attended = self._attend_clusters(inputs, shard, routed)
        else:
            attended = _routed_heads.attend_without(self.options, inputs)
        output, density = attended.output, len(routed) * attended.diagnostics["density"]
        if len(local):
            nearby = self._attend_nearby(inputs, shard, local)
            order = np.argsort([*routed, *local])
            output = jnp.concatenate([output, nearby], axis=2)[:, :, order]
            density += len(local) * super().density(num_keys)
        density = jnp.asarray(density / num_heads, jnp.float32)
        diagnostics = attended.diagnostics | {"density": density}
        return dataclasses.replace(attended, output=output, diagnostics=diagnostics)

    def inspect(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        step: Any = 0,
    ) -> dict[str, Array]:
        """Returns "head" [B, R] and what `_routed_heads.inspect` says of the routed heads.

        Args:
          x: what the module is called with, as are the others.
          positions: of each token in its document.
          segment_ids: document of each token; None: one.
          step: of training.
        """
        num_heads = self.config.num_heads
        heads = np.flatnonzero(_is_routed(num_heads, self.options.routed(num_heads)))
        if not len(heads):
            return {}
        inputs = self._inputs(x, positions, segment_ids, None, step)
        projected = inputs.unrotated_key if self.options.share_qk else inputs.unrotated_query
        centroids = self.centroids[...].astype(jnp.float32)
        vectors = _routed_heads.vectors(projected[:, :, heads], centroids)
        numbers = jnp.broadcast_to(heads, (x.shape[0], len(heads)))
        return {"head": numbers, **_routed_heads.inspect(self.options, vectors, segment_ids)}

    @classmethod
    def figures(cls, shown: Shown) -> Mapping[str, Sequence["Figure"]]:
        """Returns the clusters along the text, and their sizes, also over training."""
        return _routed_figures.draw(shown)

    def _attend_nearby(
        self, inputs: Inputs, shard: Shard, heads: np.ndarray
    ) -> Float[Array, "B T N H"]:
        """Attention of the local heads."""
        query, key, value = inputs.query, *(_of_heads(x, heads) for x in (inputs.key, inputs.value))
        if query.shape[2] > len(heads):  # routed heads have queries of their own
            query = _of_heads(query, heads)
        if not self.options.local_relative:
            return self._attend_by_rule(query, key, value, inputs.segment_ids, shard)
        return _nearby.attend(
            query,
            key,
            value,
            self.options.block_size,
            self.options.local_blocks,
            is_causal=self.config.is_causal,
            query_offset=shard.query_offset,
            segment_ids=inputs.segment_ids,
            scale=self.config.scale,
            cap=self.config.attention_soft_cap,
            relative=self.local_relative(),
        )

    def _attend_clusters(self, inputs: Inputs, shard: Shard, heads: np.ndarray) -> AttentionOutput:
        """Attention of the routed heads, and what their centroids learn from."""
        options, num_queries = self.options, inputs.query.shape[1]
        centroids = self.centroids[...].astype(jnp.float32)
        query = key = _routed_heads.vectors(_of_heads(inputs.unrotated_key, heads), centroids)
        if not options.share_qk:
            if num_queries < key.x.shape[1]:
                raise ConfigError(
                    "attention.share_qk=False: clusters of queries need all of them at once, and "
                    f"here are {num_queries} of {key.x.shape[1]}"
                )
            query = _routed_heads.vectors(_of_heads(inputs.unrotated_query, heads), centroids)
        value, scores = _of_heads(inputs.value, heads), self._scores()
        if options.selection == "causal":
            output, diagnostics = _routed_heads.attend_last_members(
                options, inputs, shard, key, value, scores
            )
        else:
            output, diagnostics = _routed_heads.attend_balanced(
                options, inputs, shard, query, key, value, self.config.is_causal, scores
            )
        both = [_routed_heads.of_queries(kind, num_queries, shard) for kind in (query, key)]
        losses = [_clusters.commitment(kind.x, centroids, kind.nearest) for kind in both]
        sums = [
            _clusters.members(kind.x, kind.nearest, inputs.weights[0], options.num_clusters)
            for kind in both[: 1 if options.share_qk else 2]
        ]
        counts, totals = (jnp.stack(each, axis=1) for each in zip(*sums, strict=True))
        return AttentionOutput(
            output,
            {"commitment": options.commitment * sum(losses)},
            diagnostics,
            {"counts": counts, "sums": totals},
        )

    def _scores(self) -> dict[str, Any]:
        """How routed heads make scores of their vectors."""
        scale = self.options.logit_scale
        return {
            "scale": self.config.scale if scale is None else scale,
            "cap": self.config.attention_soft_cap,
            "relative": self.routed_relative() if self.options.routed_relative else None,
            "masks_self": self.options.masks_self,
        }


def _is_routed(num_heads: int, num_routed: int) -> np.ndarray:
    """Which heads are routed: spread evenly."""
    ends = np.arange(num_heads + 1) * num_routed // num_heads
    return np.diff(ends) > 0


def _of_heads(x: Float[Array, "B T N H"], heads: np.ndarray) -> Float[Array, "B T n H"]:
    """Returns some heads by slices: before those, unlike a gather, XLA computes no other heads."""
    steps = np.unique(np.diff(heads))
    if len(steps) <= 1:
        step = steps[0] if len(steps) else 1
        return x[:, :, heads[0] : heads[-1] + 1 : step]
    return jnp.concatenate([x[:, :, i : i + 1] for i in heads], axis=2)
