"""What the hardware kernels share: lists, padding, gradients and vmap around them.

A backend brings two functions over arrays whose lengths are multiples of its tiles.
This file cuts the lists for its tiles, pads, ties forward and backward together and
folds a vmapped axis into the batch, which the lists may have too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import kernel_tables, precision
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.kernel_tables import Lists, Segments, Tiling
from pallas_kernels.targets import Target
from pallas_kernels.tiles import Geometry

_LOWEST_ID = -(2**31)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static that a kernel needs.

    Attributes:
        geometry: lengths before padding, causality and the window.
        forward: tiles of the forward kernel.
        d_query: tiles of the kernel for dQ.
        d_key: tiles of the kernel for dK and dV.
        scores: scale and soft cap.
        target: the machine.
        options: what else a backend tunes: stages, warps.
    """

    geometry: Geometry
    forward: Tiling
    d_query: Tiling
    d_key: Tiling
    scores: Scores
    target: Target
    options: Any = None


class Tables(NamedTuple):
    """Traced facts that have no gradient, T and S padded.

    Attributes:
        forward: key tiles of each query tile, for `Plan.forward`.
        d_query: the same for `Plan.d_query`.
        d_key: query tiles of each key tile, for `Plan.d_key`.
        query_offset: [1] or [B], position of the first query.
        segments: segment ids, if given. Padding has an id of its own.
    """

    forward: Lists
    d_query: Lists
    d_key: Lists
    query_offset: Int[Array, "b"]
    segments: Segments | None


@runtime_checkable
class Backend(Protocol):
    """The kernels of one backend.

    Head n reads key/value head n // (N / K), pattern n // (N / Hp) and, when the lists
    have a batch axis longer than 1, its own batch entry.
    """

    def forward(
        self,
        plan: Plan,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        tables: Tables,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
        """Returns (out, lse): out in the dtype of query, lse float32, natural log.

        Rows that see nothing have out 0 and lse -inf.
        """

    def backward(
        self,
        plan: Plan,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        tables: Tables,
        lse: Float[Array, "B N T"],
        shift: Float[Array, "B N T"],
        d_out: Float[Array, "B T N H"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns (dQ, dK, dV) in any floating dtype, from W = exp(S - lse):

        dV = W' dO,  dX = W (dO V' - shift) dS/dX,  dQ = dX K,  dK = dX' Q

        with X the raw products, summed over the query heads of a key/value head. lse
        is +inf in rows that see nothing, so that W is 0 there.
        """


def attend(
    backend: Backend, plan: Plan, call: Call, head_multiple: int = 1
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse), differentiable in query, key and value.

    Pads T and S to multiples of the tiles, and H to a multiple of head_multiple, with
    zeros: they add nothing to a product.
    """
    block_mask, segments = call.block_mask, None
    if call.segment_ids is not None:
        segments = Segments(*call.segment_ids)
    tilings = (plan.forward, plan.d_query, plan.d_key)
    query_multiple = math.lcm(*(tiling.query_tile for tiling in tilings))
    key_multiple = math.lcm(*(tiling.key_tile for tiling in tilings))
    query, key, value = (
        _pad(_pad(array, 1, multiple), 3, head_multiple)
        for array, multiple in (
            (call.query, query_multiple),
            (call.key, key_multiple),
            (call.value, key_multiple),
        )
    )
    lengths = (query.shape[1], key.shape[1])

    @functools.cache
    def key_lists(tiling: Tiling) -> Lists:
        lists = kernel_tables.key_lists(block_mask, tiling, segments)
        return _pad_lists(lists, lengths[0] // tiling.query_tile)

    tables = Tables(
        key_lists(plan.forward),
        key_lists(plan.d_query),
        _pad_lists(
            kernel_tables.query_lists(block_mask, plan.d_key, segments),
            lengths[1] // plan.d_key.key_tile,
        ),
        jnp.atleast_1d(jnp.asarray(block_mask.query_offset, jnp.int32)),
        _pad_segments(segments, *lengths),
    )
    out, lse = _with_gradients(backend, plan)(query, key, value, tables)
    _, length, _, head_dim = call.query.shape
    return out[:, :length, :, :head_dim], lse[:, :, :length].swapaxes(1, 2)


def _with_gradients(backend: Backend, plan: Plan) -> Callable[..., tuple[Array, Array]]:
    forward = _foldable(lambda *arrays: backend.forward(plan, *arrays))
    backward = _foldable(lambda *arrays: backend.backward(plan, *arrays))

    @jax.custom_vjp
    def attend(query: Array, key: Array, value: Array, tables: Tables) -> tuple[Array, Array]:
        return forward(query, key, value, tables)

    def attend_fwd(*inputs: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
        out, lse = forward(*inputs)
        return (out, lse), (*inputs, out, lse)

    def attend_bwd(
        residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
    ) -> tuple[Array, Array, Array, None]:
        *inputs, out, lse = residuals
        d_out, d_lse = cotangents
        is_empty = jnp.isneginf(lse)
        products = jnp.einsum(
            "btnh,btnh->bnt",
            d_out,
            out,
            precision=precision.exact(out.dtype),
            preferred_element_type=lse.dtype,
        )
        shift = jnp.where(is_empty, 0, products - d_lse)
        lse = jnp.where(is_empty, jnp.inf, lse)
        grads = backward(*inputs, lse, shift, d_out)
        return (
            *(grad.astype(x.dtype) for grad, x in zip(grads, inputs[:3], strict=True)),
            None,
        )

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


def _foldable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets vmap extend the batch, the first axis of every array, instead of the kernel."""
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def fold(size: int, is_mapped: Any, *arguments: Any) -> tuple[Any, Any]:
        batch = arguments[0].shape[1 if jax.tree.leaves(is_mapped)[0] else 0]

        def merge(array: Array, mapped: bool) -> Array:
            array = array if mapped else jnp.broadcast_to(array, (size, *array.shape))
            # Lists of batch 1 serve a whole batch, but not a batch of batches.
            array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
            return array.reshape(size * batch, *array.shape[2:])

        results = batched(*jax.tree.map(merge, arguments, tuple(is_mapped)))
        results = jax.tree.map(lambda x: x.reshape(size, batch, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return batched


def _pad(array: Array, axis: int, multiple: int, value: Any = 0) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, widths, constant_values=value) if any(widths[axis]) else array


def _pad_lists(lists: Lists, blocks: int) -> Lists:
    """Adds empty lists for tiles that are padding throughout."""
    missing = blocks - lists.counts.shape[2]

    def pad(table: Any) -> Array:
        widths = [(0, 0)] * table.ndim
        widths[2] = (0, missing)
        return jnp.pad(table, widths)

    return jax.tree.map(pad, lists)


def _pad_segments(segments: Segments | None, queries: int, keys: int) -> Segments | None:
    """Pads with an id of its own; the masks of ragged tiles hide padding as well."""
    if segments is None:
        return None
    pairs = zip(segments, (queries, keys), strict=True)
    return Segments(*(_pad(ids, -1, length, _LOWEST_ID) for ids, length in pairs))
