"""The Triton kernels as functions of JAX arrays: the backend of `differentiable`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import triton_call
from pallas_kernels.block_sparse_attention.differentiable import Plan, Tables
from pallas_kernels.block_sparse_attention.triton import kernels
from pallas_kernels.block_sparse_attention.triton.spec import Spec
from pallas_kernels.kernel_tables import Lists, Tiling


def forward(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    tables: Tables,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (out, lse), see `differentiable.Backend`."""
    batch, length, heads, _ = query.shape
    out, lse = triton_call.call(
        kernels.forward,
        *(query, key, value, *_facts(tables.forward, tables)),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        programs=batch * heads * (length // plan.forward.query_tile),
        resources=plan.options.forward.resources,
        target=plan.target,
        spec=_spec(plan, plan.forward, tables.forward, query, key, tables),
    )
    return out, lse


def backward(
    plan: Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    tables: Tables,
    lse: Float[Array, "B N T"],
    shift: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns (dQ, dK, dV), see `differentiable.Backend`."""
    batch, length, heads, _ = query.shape
    (d_query,) = triton_call.call(
        kernels.d_query,
        *(query, key, value, *_facts(tables.d_query, tables), lse, shift, d_out),
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype)],
        programs=batch * heads * (length // plan.d_query.query_tile),
        resources=plan.options.d_query.resources,
        target=plan.target,
        spec=_spec(plan, plan.d_query, tables.d_query, query, key, tables),
    )
    d_key, d_value = triton_call.call(
        kernels.d_key,
        *(query, key, value, *_facts(tables.d_key, tables), lse, shift, d_out),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        programs=batch * key.shape[2] * (key.shape[1] // plan.d_key.key_tile),
        resources=plan.options.d_key.resources,
        target=plan.target,
        spec=_spec(plan, plan.d_key, tables.d_key, query, key, tables),
    )
    return d_query, d_key, d_value


def _facts(lists: Lists, tables: Tables) -> tuple[Int[Array, "..."], ...]:
    """Returns lists, offsets and segments, with a stand-in for segments not given."""
    segments = tables.segments or (tables.query_offset, tables.query_offset)
    return (*(jnp.asarray(table, jnp.int32) for table in lists), tables.query_offset, *segments)


def _spec(
    plan: Plan, tiling: Tiling, lists: Lists, query: Array, key: Array, tables: Tables
) -> Spec:
    return Spec(
        scores=plan.scores,
        head_dim=query.shape[3],
        precision="ieee" if query.dtype == jnp.float32 else "tf32",
        tiling=tiling,
        geometry=plan.geometry,
        queries=query.shape[1],
        keys=key.shape[1],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        lists=lists.tiles.shape,
        offsets_have_batch=tables.query_offset.shape[0] > 1,
        has_segments=tables.segments is not None,
    )
