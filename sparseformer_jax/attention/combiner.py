"""Combiner: full attention at the cost of sparse, as the far part goes through summaries.

Of the keys a query may see, some are direct, D_i, and the others are cut into spans S_r:

    out_i = sum_{j in D_i} p_ij v_j + sum_r P_ir u_r,  u_r = sum_{j in S_r} softmax_j(s Q_r k_j) v_j

with p_ij and P_ir one softmax over the logits s q_i k_j and s q_i K_r together, and K_r, Q_r
the elementwise maxima of the span's keys and queries. So every allowed key has a weight above
0, and the cost is that of the pairs of queries with direct keys and with spans: n^1.5 with
spans of sqrt(n) tokens, n log n for "log_sparse". Ren et al. 2021, "Combiner: Full Attention
Transformer with Sparse Computation Cost", arXiv 2107.05768, and its released code.

    config = ModelConfig(vocab_size=256, num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2,
                         head_dim=8, mlp_dim=64)
    layer = combiner.Method(config, combiner.Options(span_size=8), rngs=nnx.Rngs(0))
    x, positions = jnp.ones((2, 50, 32)), jnp.tile(jnp.arange(50), (2, 1))
    output = layer(x, positions, None).output  # [2, 50, 32]

Deviations from the released code, all off in the golden tests: two-way spans leave out the own
block, row and column, which are direct, and what is empty; lengths need not be multiples of
spans; the last token of 2^l + 1 sees its log-sparse past. Two-way "log_sparse", of which there
is no release, tiles the future as the past of the reversed sequence. Keys are rotated before
they are pooled, and those of "axial_row" to the position they stand for.

A document is contiguous, and a span is cut to the query's: of earlier blocks only the last
document goes on to later queries. Spans are cut at multiples of s from the start of the row,
not of the document. Under context parallelism devices exchange pairs (K_r, u_r) in place of
keys and values: n / s of them for "fixed", n for "axial_row", for "log_sparse" one a device and
digit. The mixture's pooled queries read whole columns each, so it gathers queries, keys and
values, and the pairs of rows.

Decoding keeps of n tokens, besides those of the open span: n / s pairs with "fixed", n with
"axial_row", with "log_sparse" one a digit and keys and values of n / 2 to n tokens, with
"axial_mixture" keys and values of all, and 2 n pairs. A token costs its direct pairs and those
with spans, and makes the pairs of a span that it ends.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from sparseformer_jax import mesh
from sparseformer_jax.attention import (
    _combiner_axial,
    _combiner_cache,
    _combiner_fixed,
    _combiner_log,
    _combiner_mixture,
    _one_hot,
)
from sparseformer_jax.attention._block_sparse import check_implementation
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention._combiner_parts import Part, Setup, Tokens, merge, pad
from sparseformer_jax.attention.base import Attention, AttentionOutput
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import Norm, Projection
from sparseformer_jax.model.rotary import rotary


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Combiner.

    Attributes:
      variant: what is a span: "fixed" blocks, in "axial_row" the rows of a grid, read at the
        token's own column, in "axial_mixture" parts of rows and columns, in "log_sparse" the
        binary digits of the position.
      span_size: s, tokens in a block or a row; "log_sparse" reads none.
      pool: of a span's keys, and of its queries: their elementwise "max", or "deepsets", the
        same of relu(W x), W [H, H].
      mixture_pool: of "axial_mixture": "max", or "sum" as in the released TensorFlow code.
      count_own_span: bidirectional only, as released: the own block, row or column is a span
        too, and the mixture's direct row and column both hold the token.
      mask_empty: leave out the mixture's empty spans; False, bidirectional only, as released:
        they have key 0 and the mean of the whole line as value.
      implementation: of the kernel, see `block_sparse_attention`; None: the best here.
    """

    variant: Literal["fixed", "axial_row", "axial_mixture", "log_sparse"] = "fixed"
    span_size: int = 128
    pool: Literal["max", "deepsets"] = "max"
    mixture_pool: Literal["max", "sum"] = "max"
    count_own_span: bool = False
    mask_empty: bool = True
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.span_size < 1:
            raise ValueError(f"span_size={self.span_size} must be at least 1")
        is_mixture = self.variant == "axial_mixture"
        if self.mixture_pool != "max" and not is_mixture:
            raise ValueError(
                f"mixture_pool={self.mixture_pool!r}: {self.variant!r} has no mixture; leave it "
                "'max', or set variant='axial_mixture'"
            )
        if not (self.mask_empty or is_mixture):
            raise ValueError(
                f"mask_empty=False: {self.variant!r} has no empty spans; leave it True, or set "
                "variant='axial_mixture'"
            )
        if self.pool != "max" and self.variant == "axial_row":
            raise ValueError(
                f"pool={self.pool!r}: 'axial_row' pools nothing; leave it 'max', or take another "
                "variant"
            )


def check(options: Options, config: ConfigDict) -> None:
    """Refuses what the model cannot do with these options.

    Raises:
      ValueError: implementation is unknown, an option is bidirectional but the model is
        causal, or a device's part of the sequence does not hold whole spans.
    """
    check_implementation(options.implementation)
    _check_direction(options, config.model.is_causal)
    num_shards = config.mesh.context
    if num_shards > 1:
        _check_shard(options, config.data.seq_len // num_shards, num_shards)


def _check_direction(options: Options, is_causal: bool) -> None:
    if is_causal and (options.count_own_span or not options.mask_empty):
        name = "count_own_span" if options.count_own_span else "mask_empty"
        raise ValueError(
            f"{name}={getattr(options, name)}: bidirectional only; set {name}="
            f"{not getattr(options, name)}, or model.is_causal=False"
        )


def _check_shard(options: Options, num_tokens: int, num_shards: int) -> None:
    """Refuses parts of the sequence that cut spans."""
    if options.variant == "log_sparse":
        if num_tokens & (num_tokens - 1):
            raise ValueError(
                f"variant='log_sparse': mesh.context={num_shards} leaves {num_tokens} tokens to a "
                "device, which must be a power of two; change data.seq_len or mesh.context"
            )
    elif num_tokens % options.span_size:
        raise ValueError(
            f"span_size={options.span_size}: must divide the {num_tokens} tokens that "
            f"mesh.context={num_shards} leaves to a device; take smaller spans or fewer devices"
        )


_VARIANTS = {
    "fixed": _combiner_fixed,
    "axial_row": _combiner_axial,
    "axial_mixture": _combiner_mixture,
    "log_sparse": _combiner_log,
}


class Method(Attention):
    """Combiner."""

    needs = frozenset({"x"})
    gathers_keys = False
    cache_axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = _combiner_cache.AXES

    def __init__(self, config: ModelConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        _check_direction(options, config.is_causal)
        super().__init__(config, options, rngs=rngs)
        size, width = config.head_dim, config.embed_dim
        if options.pool == "deepsets":
            square = ((size,), (size,), ("head_dim", None), config)
            self.pool_query = Projection(*square, use_bias=False, rngs=rngs)
            self.pool_key = Projection(*square, use_bias=False, rngs=rngs)
        if options.variant == "axial_row":
            heads = (config.num_heads, size)
            axes = ("heads", "head_dim", "embed")
            self.row = Projection(heads, (width,), axes, config, use_bias=False, rngs=rngs)
            bias = jnp.zeros(width, config.dtypes[0])
            self.row_bias = nnx.Param(bias, axes=("embed",)) if config.out_bias else None
            self.row_norm = Norm(width, "layernorm", config)
            self.row_key = Projection(
                (width,),
                heads,
                ("embed", "heads", "head_dim"),
                config,
                use_bias=config.qkv_bias,
                rngs=rngs,
            )

    def density(self, seq_len: int) -> float:
        """Returns the pairs visited, those inside summaries too, over those of full attention."""
        options, is_causal = self.options, self.config.is_causal
        full = seq_len * (seq_len + 1) // 2 if is_causal else seq_len**2
        size, own = min(options.span_size, seq_len), options.count_own_span
        if options.variant == "fixed":
            visited = _combiner_fixed.num_pairs(seq_len, size, is_causal, own)
        elif options.variant == "axial_row":
            visited = _combiner_axial.num_pairs(seq_len, size, is_causal, own)
        elif options.variant == "axial_mixture":
            visited = _combiner_mixture.num_pairs(seq_len, size, is_causal, options)
        else:
            visited = _combiner_log.num_pairs(seq_len, is_causal)
        return visited / full

    def attend(self, inputs: Inputs, shard: Shard) -> AttentionOutput:
        """Returns attention to all of a query's past, with the density of the pairs visited.

        Raises:
          ConfigError: there are not the queries of all keys, devices share a span, or an
            option asks for what documents or ragged rows rule out.
        """
        output = self._combined(inputs, shard, inputs.value)
        density = self.density(inputs.key.shape[1] * _num_shards(shard))
        return AttentionOutput(output, diagnostics={"density": jnp.asarray(density, jnp.float32)})

    def init_cache(self, batch_size: int, size: int, num_layers: int = 1) -> Cache:
        """Returns the empty cache of so many sequences of at most `size` tokens.

        What it keeps of a span that is over are the pairs that stand for it; see the variants.
        """
        variant, span_size = _VARIANTS[self.options.variant], min(self.options.span_size, size)
        shapes = variant.shapes(size, span_size)
        return _combiner_cache.empty(shapes, self.config, num_layers, batch_size)

    def _decode(
        self, inputs: Inputs, start: Int[Array, " B"], cache: Cache, layer: Any, shard: Shard
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Attends to what is kept of the local rows and heads, and keeps these tokens."""
        setup = dataclasses.replace(
            self._setup(inputs, shard), size=_combiner_cache.span_size(cache)
        )

        def whole(inputs: Inputs) -> jax.Array:
            return self._combined(inputs, shard, inputs.value)

        variant = _VARIANTS[self.options.variant]
        return _combiner_cache.decode(variant, whole, inputs, start, cache, layer, setup)

    def weights_by_kind(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        *,
        step: Any = 0,
    ) -> dict[str, Float[Array, "B N T T"]]:
        """Returns the weights of direct pairs, and those through the summaries of spans.

        Rows of both together sum to 1 over exactly the keys that dense attention would see.

        Args:
          x: what the module is called with.
          positions: of each token in its document.
          segment_ids: document of each token; None: there is one.
          step: of training.
        """
        own = self._inputs(x, positions, segment_ids, None, step)
        shard = Shard(num_heads=self.config.num_heads)

        def attend(inputs: Inputs) -> dict[str, jax.Array]:
            copies = inputs.value.shape[0] // x.shape[0]
            key_value = jnp.concatenate([own.value] * copies)
            both = self._combined(inputs, shard, key_value, self._merge_by_kind)
            direct, through = jnp.split(both, 2, axis=-1)
            return {"direct": direct, "through summaries": through}

        return _one_hot.weights(own, attend)

    def _merge_by_kind(self, parts: list[Part], dtype: Any) -> jax.Array:
        """The softmax over all pairs with values of direct ones, and of the others: [.., 2 H]."""
        is_direct = self._is_direct(len(parts))

        def only(kind: bool) -> jax.Array:
            kept = [
                part if direct == kind else part._replace(output=jnp.zeros_like(part.output))
                for part, direct in zip(parts, is_direct, strict=True)
            ]
            return merge(kept, dtype)

        return jnp.concatenate([only(True), only(False)], axis=-1)

    def _is_direct(self, num_parts: int) -> list[bool]:
        """Which parts are of direct pairs: the first, and of the mixture the own column too.

        That comes first of those before the token, and of those behind it.
        """
        is_mixture = self.options.variant == "axial_mixture"
        each = max(1, (num_parts - 1) // (1 if self.config.is_causal else 2))
        return [i == 0 or (is_mixture and (i - 1) % each == 0) for i in range(num_parts)]

    def _combined(
        self,
        inputs: Inputs,
        shard: Shard,
        key_value: jax.Array,
        merging: Callable[[list[Part], Any], jax.Array] = merge,
    ) -> jax.Array:
        """The parts, merged; the keys of `axial_row` are made of `key_value`."""
        options, num_tokens = self.options, inputs.query.shape[1]
        setup = self._setup(inputs, shard)
        ids = None if inputs.segment_ids is None else inputs.segment_ids[0]
        is_log = options.variant == "log_sparse"
        if ids is None and num_tokens % setup.size and not self.config.is_causal and not is_log:
            ids = jnp.zeros(inputs.query.shape[:2], jnp.int32)  # to tell the padding
        if ids is not None and not options.mask_empty:
            raise ConfigError(
                "attention.mask_empty=False: averages whole lines; give one document of whole "
                f"rows of {setup.size} tokens, or leave out what is empty"
            )
        tokens = Tokens(inputs.query, inputs.key, inputs.value, ids)
        if is_log:
            return _combiner_log.attend(tokens, setup, merging)
        tokens = pad(tokens, setup.size)
        parts: list[Part]
        if options.variant == "fixed":
            parts = _combiner_fixed.parts(tokens, setup)
        elif options.variant == "axial_mixture":
            parts = _combiner_mixture.parts(tokens, setup)
        else:
            x, positions = pad((inputs.x, inputs.positions[0]), setup.size)
            keyed = tokens
            if key_value is not inputs.value:
                keyed = tokens._replace(value=pad(key_value, setup.size))
            parts = _combiner_axial.parts(tokens, keyed, x, positions, setup)
        return merging(parts, inputs.query.dtype)[:, :num_tokens]

    def _setup(self, inputs: Inputs, shard: Shard) -> Setup:
        """What variants are told; refuses what they cannot do."""
        options, num_shards = self.options, _num_shards(shard)
        num_queries, num_keys = inputs.query.shape[1], inputs.key.shape[1]
        if num_queries != num_keys:
            raise ConfigError(
                f"combiner: {num_queries} queries of {num_keys} keys; pass the queries of all "
                "keys, as those of a span are a part of its summary"
            )
        if num_shards > 1:
            try:
                _check_shard(options, num_queries, num_shards)
            except ValueError as error:
                raise ConfigError(f"attention.{error}") from None
        is_deep = options.pool == "deepsets"
        return Setup(
            self.config,
            options,
            num_queries if options.variant == "log_sparse" else min(options.span_size, num_queries),
            pool_query=_deep(self.pool_query) if is_deep else _identity,
            pool_key=_deep(self.pool_key) if is_deep else _identity,
            row_key=functools.partial(self._row_key, shard=shard),
            shard=shard,
            num_shards=num_shards,
        )

    def _row_key(
        self,
        value: Float[Array, "B T N H"],
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        shard: Shard,
    ) -> Float[Array, "B T N H"]:
        """Keys of the pairs of `axial_row`: k = W' LN(x + W value), rotated as others are."""
        mapped = self.row(value)
        if value.shape[2] < shard.num_heads:
            mapped = jax.lax.psum(mapped, mesh.LOGICAL_AXES["heads"])
        if self.row_bias is not None:
            mapped += self.row_bias[...].astype(mapped.dtype)
        key = self.row_key(self.row_norm(x + mapped))
        if self.config.position == "rope":
            key = rotary(key, positions, self.config)
        return key


def _num_shards(shard: Shard) -> int:
    """Into how many parts devices cut the sequence."""
    return jax.eval_shape(shard.gather, jax.ShapeDtypeStruct((1, 1), jnp.float32)).shape[1]


def _identity(x: jax.Array) -> jax.Array:
    return x


def _deep(layer: Projection) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jax.nn.relu(layer(x))
