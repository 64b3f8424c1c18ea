"""What a method sees of its layer: local arrays, where they lie, and noise to draw from."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparseformer_jax import mesh

# Segments of queries [B, T] and keys [B, S]; a query sees its own segment only.
SegmentIds = tuple[Int[Array, "B T"], Int[Array, "B S"]]

# Logical axes of the arrays of `Inputs`; of pairs, those of queries and of keys. "keys" is
# "seq" for a method that takes its own part of the keys, and whole for the others.
_QUERY, _KEY = ("batch", "seq", "heads", None), ("batch", "keys", "kv_heads", None)
_TOKENS = (("batch", "seq"), ("batch", "keys"))
_AXES: dict[str, Any] = {
    "query": _QUERY,
    "key": _KEY,
    "value": _KEY,
    "positions": _TOKENS,
    "segment_ids": _TOKENS,
    "weights": _TOKENS,
    "step": (),
    "x": ("batch", "seq", None),
    "unrotated_query": _QUERY,
    "unrotated_key": _KEY,
}

# What is handed over only where a method's `needs` names it.
ON_DEMAND = frozenset({"x", "unrotated_query", "unrotated_key"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """Where the local arrays of `attend` lie in the whole sequence and among all heads.

    Attributes:
      query_offset: position of the first local query.
      key_offset: position of the first local key; 0 where a method's keys are gathered.
      head_offset: index of the first local query head.
      num_heads: query heads in all shards together.
      seq_axes: axes of the mesh that cut the sequence, into equal parts.
    """

    query_offset: Any = 0
    key_offset: Any = 0
    head_offset: Any = 0
    num_heads: int = dataclasses.field(default=0, metadata={"static": True})
    seq_axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def gather(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """Returns the parts of all devices that share a sequence, in its order, along `axis`."""
        if not self.seq_axes:
            return x
        return jax.lax.all_gather(x, self.seq_axes, axis=axis, tiled=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Randomness of one layer in one step, equal on every mesh.

    Every device holds the same key: numbers drawn from it alone would repeat from shard to
    shard, and differ from those of one device. `draw` is the way to draw.

    Attributes:
      key: of the layer, the same on every device.
      shards: number of this device's shard along each logical axis; absent: 0.
    """

    key: Any
    shards: Any = dataclasses.field(default_factory=dict)

    def draw(
        self,
        sampler: Callable[[jax.Array, tuple[int, ...]], jax.Array],
        shape: Sequence[int],
        axes: Sequence[str | None],
    ) -> jax.Array:
        """Returns this device's part of noise that does not depend on the mesh.

            noise[i, j, ..] = sampler(fold_in(fold_in(key, i), j), ..)

        with i, j the indices of the named axes in the whole array.

        Args:
          sampler: called with a key and a shape, as `jax.random.gumbel` is.
          shape: of the local array.
          axes: of each dimension: "batch", "seq", "heads" or "kv_heads" where devices share
            it (tokens or blocks of them, in equal parts), None where each has all of it.

        Raises:
          ValueError: there is not an axis a dimension, or attention is not cut along one.
        """
        known = ("batch", "seq", "heads", "kv_heads", None)
        if len(axes) != len(shape) or not set(axes) <= set(known):
            raise ValueError(f"axes={tuple(axes)}: take one of {known} for each of {tuple(shape)}")
        named = [i for i, axis in enumerate(axes) if axis is not None]
        whole = [i for i, axis in enumerate(axes) if axis is None]
        keys = jnp.reshape(self.key, (1,))
        for i in named:
            index = self.shards.get(axes[i], 0) * shape[i] + jnp.arange(shape[i])
            fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
            keys = fold(keys, index).reshape(-1)
        drawn = jax.vmap(lambda key: sampler(key, tuple(shape[i] for i in whole)))(keys)
        drawn = drawn.reshape(tuple(shape[i] for i in (*named, *whole)))
        return jnp.moveaxis(drawn, range(len(shape)), (*named, *whole))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What `attend` sees: queries of one device, and all keys of their rows and heads.

    Attributes:
      query: [B, T, N, H], rotated.
      key: [B, S, K, H], rotated, of the whole sequence, S >= T; with `gathers_keys = False`
        of the local part, S = T.
      value: [B, S, K, H].
      positions: in their documents, of queries [B, T] and of keys [B, S].
      segment_ids: the same of documents; a query sees its own only. None: there is one.
      weights: the same, float32, of what tokens count in losses and statistics; 0: padding.
      step: of training, a scalar.
      noise: to draw from in training; None in evaluation.
      x: [B, T, D], the layer's normalised input. This and what follows is None, unless the
        method's `needs` names it.
      unrotated_query: [B, T, N, H], before the rotary embedding.
      unrotated_key: [B, S, K, H].
    """

    # Any: JAX also builds it of partitions and shapes.
    query: Any
    key: Any
    value: Any
    positions: Any = None
    segment_ids: Any = None
    weights: Any = None
    step: Any = 0
    noise: Any = None
    x: Any = None
    unrotated_query: Any = None
    unrotated_key: Any = None


def spec_of(name: str) -> Any:
    """Returns how an array of `Inputs` is divided over the mesh where no device cuts sequences."""
    return mesh.spec(*(None if axis in ("keys", "seq") else axis for axis in _AXES[name]))


def partition(inputs: Inputs, *, gathers_keys: bool) -> Inputs:
    """Returns how the arrays of `inputs` are divided over the mesh, None where there is none."""
    keys = None if gathers_keys else "seq"

    def placed(axes: Any) -> Any:
        return mesh.spec(*(keys if axis == "keys" else axis for axis in axes))

    def spec(name: str, axes: Any) -> Any:
        if getattr(inputs, name) is None:
            return None
        return tuple(map(placed, axes)) if axes is _TOKENS else placed(axes)

    return Inputs(**{name: spec(name, axes) for name, axes in _AXES.items()})


def local_shard(inputs: Inputs, num_heads: int, *, gathers_keys: bool) -> Shard:
    """Returns where the arrays of this device lie; called where each device runs alone."""
    query_offset = _shard_index("seq") * inputs.query.shape[1]
    return Shard(
        query_offset=query_offset,
        key_offset=0 if gathers_keys else query_offset,
        head_offset=_shard_index("heads") * (num_heads // _shards("heads")),
        num_heads=num_heads,
        seq_axes=_dividing("seq"),
    )


def local_noise(key: jax.Array) -> Noise:
    """Returns the noise of this device; called where each device runs alone."""
    cut = ("batch", "seq", "heads", "kv_heads")
    return Noise(key, {axis: _shard_index(axis) for axis in cut})


def _shard_index(axis: str) -> int | jax.Array:
    """This device's shard along a logical axis, static where the mesh does not divide it."""
    dividing = _dividing(axis)
    return jax.lax.axis_index(dividing) if dividing else 0


def _shards(axis: str) -> int:
    """Into how many shards the mesh cuts a logical axis."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in _dividing(axis))


def _dividing(axis: str) -> tuple[str, ...]:
    """The axes of the mesh that cut a logical axis."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in mesh.LOGICAL_AXES[axis] if sizes[name] > 1)
