"""What Combiner keeps to decode: summaries of what is over, tokens of what is open.

A variant is a module that says what that is:

    shapes(num_tokens, span_size)     of a sequence's arrays, before heads and their entries
    remember(prompt, lengths, setup)  those arrays, of whole prompts
    step(token, kept, setup)          parts of one token, and the arrays with it

The rest is here. Whole prompts are attended to as in training. Several tokens that follow others
are taken one by one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparseformer_jax import mesh
from sparseformer_jax.attention import _cache
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention._combiner_parts import Part, Setup, merge, softmax
from sparseformer_jax.attention.inputs import Inputs
from sparseformer_jax.model.config import ModelConfig

_OF_QUERIES, _OF_KEYS = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
_GRID_OF_QUERIES, _GRID_OF_KEYS = (("batch", None, *axes[1:]) for axes in (_OF_QUERIES, _OF_KEYS))

# Logical axes of the arrays of all variants.
AXES: Mapping[str, tuple[str | None, ...]] = {
    # Of the tokens of the open span, row or runs.
    "key": _OF_KEYS,
    "value": _OF_KEYS,
    "query": _OF_QUERIES,
    "x": ("batch", None, None),
    # What is pooled so far of keys and of queries.
    "pooled_key": _OF_KEYS,
    "pooled_query": _OF_QUERIES,
    # Pairs that stand for spans.
    "span_key": _OF_KEYS,
    "span_value": _OF_QUERIES,
    # Of columns down to an even row, and to an odd one; of the cells of a grid.
    "column_key": _GRID_OF_KEYS,
    "column_value": _GRID_OF_QUERIES,
    "row_key": _GRID_OF_QUERIES,
    "row_value": _GRID_OF_QUERIES,
    "left_key": _GRID_OF_KEYS,
    "left_value": _GRID_OF_QUERIES,
    "right_key": _GRID_OF_KEYS,
    "right_value": _GRID_OF_QUERIES,
    "grid_key": _GRID_OF_KEYS,
    "grid_value": _GRID_OF_KEYS,
}

# Pooled further: not to be rounded in between.
_IN_FLOAT32 = frozenset({"pooled_key", "pooled_query", "column_key"})


@dataclasses.dataclass(frozen=True)
class Kept:
    """The arrays of a layer, while one token is added to every sequence.

    A step writes first, then reads what it wrote, and what only `where_any` needs in there: XLA
    copies arrays whole which it cannot tell to be read before they change in place.

    Attributes:
      cache: of all layers.
      layer: the number of this one.
      position: of the token.
      is_own: whether it is the sequence's; of one that only fills its row up nothing is kept.
    """

    cache: Cache
    layer: Any
    position: Int[Array, " B"]
    is_own: Bool[Array, " B"]

    def __contains__(self, name: str) -> bool:
        return name in self.cache

    def __getitem__(self, name: str) -> Shaped[Array, "B ..."]:
        return self.cache[name][self.layer]

    def at(self, name: str, *places: Any) -> Shaped[Array, "B ..."]:
        """Returns what stands at places of each sequence, [B] or [B, n] an axis, or a slice."""
        rows = jnp.arange(len(self.position))
        rank = max(jnp.ndim(place) for place in places if not isinstance(place, slice))
        return self.cache[name][(self.layer, rows.reshape(-1, *(1,) * (rank - 1)), *places)]

    def put(
        self,
        name: str,
        places: tuple[Any, ...],
        x: Shaped[Array, "B ..."],
        where: Bool[Array, " B"] | bool = True,
    ) -> "Kept":
        """Returns the arrays with x at those places, of the sequences `where` says so.

        Places beyond the end are left out.
        """
        kept, batch = self.cache[name], len(self.position)
        rows = jnp.where(self.is_own & where, jnp.arange(batch), batch)
        # In place, where a slice of the layer would be copied whole.
        kept = kept.at[(self.layer, rows, *places)].set(x.astype(kept.dtype), mode="drop")
        return dataclasses.replace(self, cache={**self.cache, name: kept})


def empty(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, num_layers: int, batch_size: int
) -> Cache:
    """Returns a variant's arrays of zeros, over the mesh if any; those without entries are none."""
    num_heads = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    _, dtype = config.dtypes

    def zeros(name: str, shape: tuple[int, ...]) -> jax.Array:
        *_, heads, _ = AXES[name]
        entries = (config.embed_dim,) if heads is None else (num_heads[heads], config.head_dim)
        own = jnp.promote_types(dtype, jnp.float32) if name in _IN_FLOAT32 else dtype
        return jnp.zeros((num_layers, batch_size, *shape, *entries), own)

    cache = {name: zeros(name, shape) for name, shape in shapes.items() if 0 not in shape}
    if not mesh.is_active():
        return cache
    return jax.tree.map(jax.reshard, cache, _cache.partition(cache, AXES))


def span_size(cache: Cache) -> int:
    """Returns the tokens of the open span that a cache has room for."""
    return next(cache[name].shape[2] for name in ("query", "key") if name in cache)


def decode(
    variant: Any,
    whole: Callable[[Inputs], jax.Array],
    inputs: Inputs,
    start: Int[Array, " B"],
    cache: Cache,
    layer: Any,
    setup: Setup,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """Returns the attended values of the next tokens of each sequence, and the cache with them.

    Args:
      variant: a module, as above.
      whole: attends inside whole sequences.
      inputs: of the T tokens.
      start: position of the first.
      cache: of those before.
      layer: which of the layers that share it this is.
      setup: of the variant.
    """
    num_tokens = inputs.query.shape[1]
    is_own = inputs.weights[0] > 0

    def step(cache: Cache, index: Any) -> tuple[Cache, jax.Array]:
        token = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1) if x.ndim else x, inputs
        )
        kept = Kept(cache, layer, start + index, token.weights[0][:, 0] > 0)
        parts, kept = variant.step(token, kept, setup)
        return kept.cache, merge(parts, inputs.query.dtype)

    if num_tokens == 1:
        cache, output = step(cache, 0)
        return output, cache

    def prompts(cache: Cache) -> tuple[jax.Array, Cache]:
        state = variant.remember(inputs, jnp.sum(is_own, axis=1), setup)
        written = {name: _fill(kept, state[name], layer) for name, kept in cache.items()}
        return whole(inputs), written

    def one_by_one(cache: Cache) -> tuple[jax.Array, Cache]:
        cache, output = jax.lax.scan(step, cache, jnp.arange(num_tokens))
        return output[:, :, 0].swapaxes(0, 1), cache

    return jax.lax.cond(jnp.all(start == 0), prompts, one_by_one, cache)


def _fill(kept: Shaped[Array, "..."], x: Shaped[Array, "..."], layer: Any) -> jax.Array:
    """Writes what there is room for; more has ended with the sequence, or is not over."""
    count = min(kept.shape[2], x.shape[1])
    return kept.at[layer, :, :count].set(x[:, :count].astype(kept.dtype))


def attend(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S V H"],
    seen: Bool[Array, "B S"],
    setup: Setup,
) -> Part:
    """Returns the attention of one query a sequence to the keys it sees, in float32.

    Args:
      query: the queries.
      key: of K heads, each for a group of N / K queries.
      value: of K heads, or N.
      seen: by each sequence's query.
      setup: of the variant.
    """
    shape, num_kv_heads = query.shape, key.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    exact: Any = {"precision": "highest", "preferred_element_type": dtype}
    query = query.reshape(len(query), num_kv_heads, -1, shape[-1])
    logits = setup.scores.logits(jnp.einsum("bkgh,bskh->bkgs", query, key, **exact))
    weights, lse = softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
    if value.shape[2] == num_kv_heads:
        output = jnp.einsum("bkgs,bskh->bkgh", weights, value, **exact)
    else:
        value = value.reshape(*value.shape[:2], num_kv_heads, -1, shape[-1])
        output = jnp.einsum("bkgs,bskgh->bkgh", weights, value, **exact)
    return Part(output.reshape(shape), lse.reshape(shape[:-1]))


def where_any(needed: Bool[Array, " B"], make: Callable[[], Any]) -> Any:
    """Returns what `make` makes if any sequence needs it, otherwise zeros in its place."""

    def zeros() -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))

    return jax.lax.cond(jnp.any(needed), make, zeros)


def chosen(where: Bool[Array, "*B"], x: Any, y: Any) -> Any:
    """Returns the first of two arrays where the leading dimensions say so."""
    return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim)), x, y)


def first(x: Shaped[Array, "B R ..."], count: Int[Array, " B"]) -> Shaped[Array, "B R ..."]:
    """Returns so many of what each sequence has, and zeros in place of the others."""
    return chosen(jnp.arange(x.shape[1]) < count[:, None], x, 0)


def open_tokens(
    x: Shaped[Array, "B T ..."], lengths: Int[Array, " B"], size: int
) -> Shaped[Array, "B s ..."]:
    """Returns the tokens of each sequence's open span, then zeros."""
    places = (lengths // size * size)[:, None] + jnp.arange(size)
    found = x[jnp.arange(len(x))[:, None], jnp.minimum(places, x.shape[1] - 1)]
    return first(found, lengths % size)


def is_open(lengths: Int[Array, " B"], size: int) -> Bool[Array, "B s"]:
    """Returns which of the open span's tokens there are."""
    return jnp.arange(size) < (lengths % size)[:, None]
