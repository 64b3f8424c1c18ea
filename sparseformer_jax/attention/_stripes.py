"""Blocks that a cache keeps for good beside its ring: the stripes of each key/value head."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.rules import Rule
from sparseformer_jax.attention import _cache, _one_query
from sparseformer_jax.attention._cache import Cache
from sparseformer_jax.attention.inputs import Inputs

KEYS = ("stripe_key", "stripe_value")


@dataclasses.dataclass(frozen=True)
class Stripes:
    """Where the tokens of stripes lie, by their positions: block by block.

        block n of P tokens, the i-th of a head's F in each stride:  place (n // stride F + i) P

    Attributes:
      block_size: P.
      stride: of the blocks, after which the pattern repeats.
      phases: [K, F], the blocks below the stride that a head keeps, rising.
    """

    block_size: int
    stride: int
    phases: Any

    def num_places(self, num_tokens: Any) -> Any:
        """Returns how many places the stripes of so many tokens take."""
        strides = -(-num_tokens // (self.block_size * self.stride))
        return strides * self.phases.shape[1] * self.block_size

    def num_tokens(self, num_places: int) -> int:
        """Returns how many tokens have stripes of so many places."""
        return num_places // self.phases.shape[1] * self.stride

    def take_heads(self, first: Any, num_heads: int) -> "Stripes":
        """Returns those of some key/value heads."""
        phases = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.phases), first, num_heads)
        return dataclasses.replace(self, phases=phases)

    def places(self, positions: Int[Array, "*S"]) -> Int[Array, "*S K"]:
        """Returns where each head keeps tokens, -1 where it does not."""
        block, inside = jnp.divmod(positions[..., None], self.block_size)
        is_own = self.phases == (block % self.stride)[..., None]  # [*S, K, F]
        rank = block // self.stride * self.phases.shape[1] + jnp.argmax(is_own, axis=-1)
        return jnp.where(jnp.any(is_own, axis=-1), rank * self.block_size + inside, -1)

    def positions(self, places: Int[Array, " C"]) -> Int[Array, "K C"]:
        """Returns the position of the token at each place of each head."""
        rank, inside = jnp.divmod(places, self.block_size)
        strides, phase = jnp.divmod(rank, self.phases.shape[1])
        block = strides * self.stride + jnp.asarray(self.phases)[:, phase]
        return block * self.block_size + inside


def of_rule(rule: Rule, stride: int, left: int, num_kv_heads: int) -> Stripes | None:
    """Returns what queries see beyond `left` blocks of what repeats after a stride; None: all."""
    heads, blocks = np.arange(rule.pattern_heads)[:, None], np.arange(stride)
    seen = np.asarray(rule.visible(heads, blocks + left + stride, blocks))
    groups = min(num_kv_heads, rule.pattern_heads)
    kept = np.asarray(seen.reshape(groups, -1, stride).any(1))
    if np.any(np.all(kept, axis=1)):
        return None
    phases = np.stack([np.flatnonzero(row) for row in kept])
    return Stripes(rule.block_size or 1, stride, np.repeat(phases, num_kv_heads // groups, axis=0))


def write_one(
    cache: Cache, inputs: Inputs, start: Int[Array, " B"], layer: Any, stripes: Stripes
) -> Cache:
    """Returns the arrays of stripes with one token more a row, where a head keeps it."""
    is_own = (inputs.weights[0] > 0) & (stripes.places(start) >= 0)
    places = jnp.where(is_own, stripes.places(start), cache[KEYS[0]].shape[2])
    rows, heads = jnp.arange(len(start))[:, None], jnp.arange(places.shape[1])
    return {
        name: cache[name]
        .at[layer, rows, places, heads]
        .set(new[:, 0].astype(cache[name].dtype), mode="drop")
        for name, new in zip(KEYS, (inputs.key, inputs.value), strict=True)
    }


def part(
    cache: Cache,
    start: Int[Array, " B"],
    layer: Any,
    stripes: Stripes,
    visible: Callable[[Int[Array, "B K C"]], Bool[Array, "B P C"]],
) -> _one_query.Part:
    """Returns the stripes that the ring has lost, for queries at `start`, the last of all."""
    ring, num_kept = (cache[name].shape[2] for name in (_cache.KEYS[0], KEYS[0]))

    def chunk(index: Any) -> _one_query.Chunk:
        key, value, places = _cache.read_chunk(cache, KEYS, layer, index)
        positions = stripes.positions(places)
        is_lost = (0 <= places) & (positions <= start[:, None, None] - ring)
        return key, value, visible(jnp.where(is_lost, positions, -1))

    width = _cache.chunk_width(num_kept)
    if width == num_kept:
        return chunk, 1
    lost = stripes.num_places(jnp.maximum(jnp.max(start) + 1 - ring, 0))
    return chunk, (jnp.minimum(lost, num_kept) + width - 1) // width


def push(
    cache: Cache, inputs: Inputs, start: Int[Array, " B"], layer: Any, stripes: Stripes
) -> tuple[Inputs, Cache]:
    """Returns inputs of queries over all keys that any of them sees, in order, and the cache.

    Where a head kept none, there is another.
    """
    ring, num_kept = (cache[name].shape[2] for name in (_cache.KEYS[0], KEYS[0]))
    num_queries, first = inputs.query.shape[1], start[:, None, None]
    new = ring + num_kept
    keys = jnp.arange(stripes.num_tokens(num_kept))
    number = keys[:, None] - first  # from the first new token on, [B, S, 1]
    old = jnp.where(number >= -ring, (keys % ring)[:, None], ring + stripes.places(keys))
    order = jnp.where(number < 0, old, new + jnp.minimum(number, num_queries - 1))
    last = _cache.last_written(inputs, start, ring)[..., None]
    to_ring = jnp.where(last < 0, jnp.arange(ring)[:, None], new + last)
    number = stripes.positions(jnp.arange(num_kept)).T - first  # [B, places, K]
    count = jnp.sum(inputs.weights[0] > 0, axis=1)[:, None, None]
    is_new = (0 <= number) & (number < count)
    to_stripes = jnp.where(is_new, new + number, ring + jnp.arange(num_kept)[:, None])

    def take(x: jax.Array, places: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(places, (*places.shape[:2], x.shape[2]))
        return jnp.take_along_axis(x, places[..., None], axis=1)

    seen, written = {}, {}
    for name, stripe in zip(_cache.KEYS, KEYS, strict=True):
        kept = [cache[name][layer], cache[stripe][layer]]
        joined = jnp.concatenate([*kept, getattr(inputs, name).astype(kept[0].dtype)], axis=1)
        seen[name] = take(joined, order)
        written[name] = cache[name].at[layer].set(take(joined, to_ring))
        written[stripe] = cache[stripe].at[layer].set(take(joined, to_stripes))
    positions = jnp.broadcast_to(keys, (len(start), len(keys)))
    return _cache.over(inputs, seen, positions, positions < start[:, None] + num_queries), written
