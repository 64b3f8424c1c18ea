"""Block maxima in Triton, for NVIDIA GPUs from Ampere on."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.block_max.axis import Axis, power_of_two, visible_tiles
from pallas_kernels.block_max.call import Call
from pallas_kernels.block_max.triton.spec import Spec
from pallas_kernels.targets import Target
from pallas_kernels.triton_call import Resources

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_LARGEST_HEAD_DIM = 256


def refusal(call: Call, target: Target) -> str | None:
    """Returns why it cannot compute the call there; None when it can."""
    if target.platform != "cuda" or target.compute_capability is None:
        return f"needs an NVIDIA GPU, not {target.platform}"
    capability, dtype = target.compute_capability, call.query.dtype
    if capability < 80:
        return f"needs compute capability 8.0 (Ampere) or newer, not {capability / 10}"
    if dtype not in _DTYPES:
        return f"it takes bfloat16, float16 and float32, not {dtype}"
    head_dim = call.query.shape[-1]
    if head_dim > _LARGEST_HEAD_DIM:
        return f"head_dim={head_dim} must be at most {_LARGEST_HEAD_DIM}"
    return triton_call.refusal()


def block_max(call: Call, target: Target) -> Float[Array, "B n M J"]:
    """Returns the maxima."""
    from pallas_kernels.block_max.triton import kernel  # It imports triton.

    spec = _spec(call)
    queries, keys = spec.query_axis, spec.key_axis
    query_ids = key_ids = call.query_offset  # Stands in for segments not given.
    if call.segment_ids is not None:
        query_ids = queries.cut(call.segment_ids[0].astype(jnp.int32))
        key_ids = keys.cut(call.segment_ids[1].astype(jnp.int32))
    shape = (call.query.shape[0], spec.row_heads, queries.slots, keys.slots)
    (maxima,) = triton_call.call(
        kernel.block_max,
        queries.cut(call.query),
        keys.cut(call.key),
        queries.cut(call.lse.astype(jnp.float32)),
        *_visible_columns(spec, call.query_offset),
        call.query_offset,
        query_ids,
        key_ids,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        programs=shape[0] * spec.row_heads * spec.row_programs,
        resources=Resources(warps=8, stages=3),
        target=target,
        zeroed=True,
        spec=spec,
    )
    return maxima[:, :, : queries.blocks, : keys.blocks]


def _spec(call: Call) -> Spec:
    geometry, head_dim, is_exact = call.geometry, call.query.shape[-1], _is_exact(call)
    # Key blocks that are tiles of their own need no cut through the scores.
    widest = 32 if is_exact or head_dim > 128 else 128
    padded = power_of_two(geometry.key_block_size)
    tile = min(max(32, padded), widest)
    keys = Axis(geometry.key_length, geometry.key_block_size, padded, tile)
    padded = power_of_two(geometry.query_block_size)
    tile = 32 if is_exact else 128
    queries = Axis(geometry.query_length, geometry.query_block_size, padded, tile)
    return Spec(
        scores=call.scores,
        head_dim=head_dim,
        precision="ieee" if is_exact else "tf32",
        geometry=geometry,
        query_axis=queries,
        key_axis=keys,
        heads=call.query.shape[2],
        kv_heads=call.key.shape[2],
        over_group=call.over_group,
        has_segments=call.segment_ids is not None,
    )


def _is_exact(call: Call) -> bool:
    """float32 is computed as such, off the tensor cores."""
    return bool(call.query.dtype == jnp.float32)


def _visible_columns(
    spec: Spec, offset: Int[Array, ""]
) -> tuple[Int[Array, "rows"], Int[Array, "rows"]]:
    """Returns where the columns that a row of blocks sees start and stop."""
    queries, size = spec.query_axis, spec.query_tile * spec.query_pieces
    first = jnp.arange(spec.row_programs, dtype=jnp.int32) * size
    ends = (offset + queries.token(x) for x in (first, first + size - 1))
    find = jax.vmap(functools.partial(visible_tiles, spec.geometry, spec.key_axis))
    start, stop = find(*ends)
    # Several tiles make one column where a block is larger than a tile.
    return start // spec.key_pieces, -(-stop // spec.key_pieces)
