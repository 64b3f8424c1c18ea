"""The gates of SeerAttention: scores of blocks of keys from pooled keys and queries.

    prefill   s_mj = RoPE(pool_m(q) W_q) . RoPE(pool_j(k) W_k) / sqrt(D)    per query head
    decode    s_tj = RoPE(branch(q_t)) . RoPE(pool_j(k) W_k) / sqrt(D)      per key/value head

of queries and keys before their own rotation. A pooled block turns by the position of its first
token. Gao et al. 2024, "SeerAttention", arXiv 2410.13276, and 2025, "SeerAttention-R",
arXiv 2506.08889, as released.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import Norm
from sparseformer_jax.model.rotary import rotary

POOLS = ("max", "min", "avg")  # in this order along the channels, whatever the order asked for

_INIT_STDDEV = 0.02  # the `initializer_range` of the released models


@dataclasses.dataclass(frozen=True)
class GateOptions:
    """What a gate is made of.

    Attributes:
      gates: "prefill" scores blocks of queries for each query head, "decode" single queries for
        each key/value head.
      block_size: P, tokens in a block.
      gate_dim: D, of the scores' products; None: the model's head_dim.
      query_pools: of "max", "min", "avg", what blocks of queries are pooled by, in "prefill".
      key_pools: the same of keys.
      query_projection: of pooled queries "none", or "head": a matrix for each query head, and
        then one for each key/value head's keys, no longer for each query head's. Of single
        queries "group": a matrix for each head of a group, added up; "average": one of the
        group's average; "none": the average.
      gate_norm: RMSNorm of both sides of the product before they turn.
    """

    gates: Literal["prefill", "decode"] = "prefill"
    block_size: int = 64
    gate_dim: int | None = None
    query_pools: tuple[str, ...] = ("avg",)
    key_pools: tuple[str, ...] = POOLS
    query_projection: Literal["none", "head", "group", "average"] = "none"
    gate_norm: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")
        if self.gate_dim is not None and self.gate_dim < 2:
            raise ValueError(f"gate_dim={self.gate_dim} must be at least 2")
        for name in ("query_pools", "key_pools"):
            pools = getattr(self, name)
            if not pools or not set(pools) <= set(POOLS) or len(set(pools)) < len(pools):
                raise ValueError(f"{name}={pools}: take some of {POOLS}, each once")
        taken = {"prefill": ("none", "head"), "decode": ("none", "group", "average")}[self.gates]
        if self.query_projection not in taken:
            raise ValueError(
                f"query_projection={self.query_projection!r}: gates={self.gates!r} takes {taken}"
            )
        if (
            self.gates == "prefill"
            and self.query_projection == "none"
            and len(self.query_pools) > 1
        ):
            raise ValueError(
                f"query_pools={self.query_pools}: without a projection queries have one; "
                "set query_projection='head'"
            )

    def dim(self, config: ModelConfig) -> int:
        """Returns D."""
        return config.head_dim if self.gate_dim is None else self.gate_dim


def check_gates(options: GateOptions, config: ModelConfig) -> None:
    """Refuses gates whose size the model's heads do not allow.

    Raises:
      ValueError: queries that nothing projects have another size, or RoPE turns no whole pairs.
    """
    dim = options.dim(config)
    if options.query_projection == "none" and dim != config.head_dim:
        raise ValueError(
            f"gate_dim={dim}: queries that nothing projects have model.head_dim="
            f"{config.head_dim} entries; set query_projection, or gate_dim to that"
        )
    turned = dim * config.partial_rotary_factor
    if config.position == "rope" and (abs(turned - round(turned)) > 1e-6 * dim or turned % 2):
        raise ValueError(f"gate_dim={dim}: RoPE turns {turned:g} of its entries; make that even")


def pool(
    x: Float[Array, "B S K H"], size: int, pools: Sequence[str], is_kept: Bool[Array, "B S"]
) -> Float[Array, "B J K pH"]:
    """Returns maxima, minima and averages of blocks of tokens, those asked for, in this order.

    Args:
      x: vectors of tokens.
      size: P, tokens in a block; the last block may be short.
      pools: of `POOLS`.
      is_kept: which tokens count; a block without any is 0.
    """
    padding = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)])
    is_kept = jnp.pad(is_kept, [(0, 0), (0, padding)])
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    kept = is_kept.reshape(*x.shape[:3], 1, 1)
    count = jnp.sum(kept, axis=2)

    def pooled(kind: str) -> jax.Array:
        if kind == "avg":
            total = jnp.sum(jnp.where(kept, x, 0), axis=2, dtype=jnp.float32)
            return (total / jnp.maximum(count, 1)).astype(x.dtype)
        fill, reduce = {"max": (-jnp.inf, jnp.max), "min": (jnp.inf, jnp.min)}[kind]
        return jnp.where(count > 0, reduce(jnp.where(kept, x, fill), axis=2), 0)

    return jnp.concatenate([pooled(kind) for kind in POOLS if kind in pools], axis=-1)


class BlockGate(nnx.Module):
    """The parameters of one layer's gate, and the two sides of its products.

    Args:
      config: of the model.
      options: of the gate.
      rngs: random streams for the parameters.

    Raises:
      ValueError: the model's heads do not allow the options.
    """

    def __init__(self, config: ModelConfig, options: GateOptions, *, rngs: nnx.Rngs) -> None:
        check_gates(options, config)
        self.options = options
        dim, size = options.dim(config), config.head_dim
        # RoPE turns as many of the gate's entries, relative to all, as of the model's.
        self.config = dataclasses.replace(config, head_dim=dim)
        self.dtype = config.dtypes[1]

        def weights(axis: str, *shape: int) -> nnx.Param:
            values = _INIT_STDDEV * jax.random.normal(rngs.params(), shape, config.dtypes[0])
            return nnx.Param(values, axes=(axis, *(None,) * (len(shape) - 1)))

        def norm() -> Norm:
            plain = dataclasses.replace(config, norm_eps=1e-6, norm_unit_offset=False)
            return Norm(dim, "rmsnorm", plain)

        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.query = {
            "none": lambda: None,
            "head": lambda: weights("heads", heads, len(options.query_pools) * size, dim),
            "group": lambda: weights("kv_heads", kv_heads, heads // kv_heads, size, dim),
            "average": lambda: weights("kv_heads", kv_heads, size, dim),
        }[options.query_projection]()
        # Pooled queries that nothing projects meet keys projected for each of them.
        is_single = options.gates == "prefill" and self.query is None
        of_keys = ("heads", heads) if is_single else ("kv_heads", kv_heads)
        self.key = weights(*of_keys, len(options.key_pools) * size, dim)
        self.query_norm = norm() if options.gate_norm else None
        self.key_norm = norm() if options.gate_norm else None

    def queries(
        self, x: Float[Array, "B M N pH"], positions: Int[Array, "B M"]
    ) -> Float[Array, "B M n D"]:
        """Returns the side of the queries, of n = N heads in "prefill", n = K in "decode".

        Args:
          x: pooled blocks of queries in "prefill", single queries in "decode".
          positions: of each block's first token, or of each query, in their documents.
        """
        kind = self.options.query_projection
        if self.options.gates == "decode":
            group = self.config.num_heads // self.config.num_kv_heads
            x = x.reshape(*x.shape[:2], -1, group, x.shape[-1])
            if kind != "group":
                x = jnp.mean(x, axis=3, dtype=jnp.float32).astype(x.dtype)
        if self.query is not None:
            contraction = "bmkgh,kghd->bmkd" if kind == "group" else "bmnh,nhd->bmnd"
            x = jnp.einsum(contraction, x, self.query[...].astype(self.dtype))
        return self._turned(x if self.query_norm is None else self.query_norm(x), positions)

    def keys(
        self, pooled: Float[Array, "B J K pH"], positions: Int[Array, "B J"]
    ) -> Float[Array, "B J k D"]:
        """Returns the side of the keys, of k = K heads, or N where each query head has its own.

        Args:
          pooled: blocks of keys.
          positions: of each block's first token in its document.
        """
        weights = self.key[...].astype(self.dtype)
        pooled = jnp.repeat(pooled, weights.shape[0] // pooled.shape[2], axis=2)
        x = jnp.einsum("bjkh,khd->bjkd", pooled, weights)
        return self._turned(x if self.key_norm is None else self.key_norm(x), positions)

    def _turned(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return rotary(x, positions, self.config) if self.config.position == "rope" else x


def scores(
    queries: Float[Array, "B M n D"], keys: Float[Array, "B J k D"]
) -> Float[Array, "B n M J"]:
    """Returns the scores of all blocks of keys, q . k / sqrt(D), in float32; nothing is masked."""
    batch, rows, heads, dim = queries.shape
    queries = queries.reshape(batch, rows, keys.shape[2], -1, dim)
    found = jnp.einsum("bmkgd,bjkd->bkgmj", queries, keys, preferred_element_type=jnp.float32)
    return found.reshape(batch, heads, rows, -1) / math.sqrt(dim)
