"""Block maxima in plain JAX: a scan over query tiles, a loop over the keys they see.

Letters: L programs (a key head of a batch entry) of U are computed together, each with G
query heads; tiles have Q queries in r blocks and P keys in c blocks, or are part of a
block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import precision
from pallas_kernels.block_max.axis import Axis, visible_tiles
from pallas_kernels.block_max.call import Call
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.geometry import Geometry, Mask
from pallas_kernels.targets import Target

_QUERY_TILE, _KEY_TILE = 256, 512
# Enough parallel work for an accelerator, 64 MiB in float32.
_SCORES_IN_FLIGHT = 2**24


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static; `lanes` programs are computed together."""

    geometry: Geometry
    queries: Axis
    keys: Axis
    scores: Scores
    over_group: bool
    lanes: int


class _Rows(NamedTuple):
    """A query tile of L programs, or all R = tiles * U / L of them with R in front."""

    query: Float[Array, "*R L G Q H"]
    lse: Float[Array, "*R L G Q"]
    segments: Int[Array, "*R L 1 Q"] | None
    position: Int[Array, "*R Q"]
    first_program: Int[Array, "*R"]


class _Keys(NamedTuple):
    """The padded keys of all programs."""

    key: Float[Array, "U P H"]
    segments: Int[Array, "U P"] | None
    position: Int[Array, "P"]

    def tile(self, plan: _Plan, first_program: Array, number: Array) -> "_Keys":
        """Returns one tile of as many programs as are computed together."""
        start, size = number * plan.keys.tile, plan.keys.tile

        def read(array: Shaped[Array, "U P *H"]) -> Shaped[Array, "L p *H"]:
            array = lax.dynamic_slice_in_dim(array, first_program, plan.lanes)
            return lax.dynamic_slice_in_dim(array, start, size, axis=1)

        segments = None if self.segments is None else read(self.segments)
        position = lax.dynamic_slice_in_dim(self.position, start, size)
        return _Keys(read(self.key), segments, position)


def refusal(call: Call, target: Target) -> None:
    """Returns None: it runs everywhere."""


def block_max(call: Call, target: Target) -> Float[Array, "B n M J"]:
    """Returns the maxima, in O(T + S) memory besides them."""
    geometry = call.geometry
    queries = _axis(geometry.query_length, geometry.query_block_size, _QUERY_TILE)
    keys = _axis(geometry.key_length, geometry.key_block_size, _KEY_TILE)
    programs = call.key.shape[0] * call.key.shape[2]
    lanes = _lanes(programs, call.group * queries.tile * keys.tile)
    plan = _Plan(geometry, queries, keys, call.scores, call.over_group, lanes)
    # The cache of a CPU holds the scores of one tile.
    return lax.platform_dependent(
        call.query,
        call.key,
        call.lse,
        call.segment_ids,
        call.query_offset,
        cpu=functools.partial(_block_max, dataclasses.replace(plan, lanes=1)),
        default=functools.partial(_block_max, plan),
    )


def _axis(length: int, block: int, target: int) -> Axis:
    if block > target:
        return Axis(length, block, 1 << (block - 1).bit_length(), target)
    return Axis(length, block, block, block * min(target // block, -(-length // block)))


def _lanes(programs: int, scores: int) -> int:
    """Programs that an accelerator computes together, a divisor of all."""
    most = max(1, min(programs, _SCORES_IN_FLIGHT // scores))
    return max(n for n in range(1, most + 1) if programs % n == 0)


def _block_max(
    plan: _Plan,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float[Array, "B T N"],
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    offset: Int[Array, ""],
) -> Float[Array, "B n M J"]:
    query_ids = key_ids = None
    if segment_ids is not None:
        every_head = (1, 1, key.shape[2])
        query_ids, key_ids = (jnp.tile(ids[..., None], every_head) for ids in segment_ids)
        query_ids, key_ids = _query_tiles(plan, query_ids, key), _key_programs(plan, key_ids)
    groups = key.shape[0] * key.shape[2] // plan.lanes
    tiles, size = plan.queries.tiles, plan.queries.tile
    position = plan.queries.token(np.arange(tiles * size)).reshape(tiles, size)
    rows = _Rows(
        _query_tiles(plan, query, key),
        _query_tiles(plan, lse, key),
        query_ids,
        offset + np.repeat(position, groups, axis=0).astype(np.int32),
        jnp.tile(jnp.arange(groups) * plan.lanes, tiles),
    )
    position = plan.keys.token(np.arange(plan.keys.tiles * plan.keys.tile))
    keys = _Keys(_key_programs(plan, key), key_ids, jnp.asarray(position, np.int32))
    _, maxima = lax.scan(lambda _, row: (None, _tile_maxima(plan, row, keys)), None, rows)
    # [tiles * U / L, L, n / K, r, slots] to [B, n, M, J].
    maxima = maxima.reshape(tiles, key.shape[0], -1, *maxima.shape[-2:])
    maxima = jnp.moveaxis(maxima, 0, 2)
    maxima = maxima.reshape(*maxima.shape[:2], -1, plan.queries.tiles_in_block, plan.keys.slots)
    return maxima.max(3)[:, :, : plan.queries.blocks, : plan.keys.blocks]


def _query_tiles(
    plan: _Plan, array: Shaped[Array, "B T N *H"], key: Float[Array, "B S K H"]
) -> Shaped[Array, "R L G Q *H"]:
    batch, _, kv_heads, _ = key.shape
    array = plan.queries.cut(array)
    array = array.reshape(
        batch, plan.queries.tiles, plan.queries.tile, kv_heads, -1, *array.shape[3:]
    )
    array = jnp.moveaxis(array, (1, 0, 3, 4, 2), range(5))
    return array.reshape(-1, plan.lanes, *array.shape[3:])


def _key_programs(plan: _Plan, array: Shaped[Array, "B S K *H"]) -> Shaped[Array, "U P *H"]:
    array = plan.keys.cut(array).swapaxes(1, 2)
    return array.reshape(-1, *array.shape[2:])


def _tile_maxima(plan: _Plan, rows: _Rows, keys: _Keys) -> Float[Array, "L g r slots"]:
    """Returns the maxima of one query tile of L programs over all blocks of keys."""
    queries, dtype = plan.queries, rows.lse.dtype
    first, last = rows.position[0], rows.position[-1]
    start, stop = visible_tiles(plan.geometry, plan.keys, first, last)
    lanes, group, _ = rows.lse.shape
    heads = (lanes, 1, group) if plan.over_group else (lanes, group, 1)

    def read_tile(
        number: Int[Array, ""], maxima: Float[Array, "L g r slots"]
    ) -> Float[Array, "L g r slots"]:
        tile = keys.tile(plan, rows.first_program, number)
        raw = jnp.einsum(
            "lgqh,lph->lgqp",
            rows.query,
            tile.key,
            precision=precision.exact(rows.query.dtype),
            preferred_element_type=dtype,
        )
        raw = jnp.where(_mask(plan, rows, tile), raw, -jnp.inf)
        peaks = raw.reshape(*raw.shape[:3], plan.keys.blocks_in_tile, -1).max(-1)
        # The largest product has the largest logit: one of each block is enough.
        logits = jnp.where(jnp.isneginf(peaks), -jnp.inf, plan.scores.logits(peaks))
        weights = jnp.exp(logits - rows.lse[..., None])
        blocks = weights.reshape(*heads, queries.blocks_in_tile, -1, weights.shape[-1])
        found = blocks.max((2, 4))
        slot = lax.div(number * plan.keys.blocks_in_tile, np.int32(plan.keys.tiles_in_block))
        known = lax.dynamic_slice_in_dim(maxima, slot, found.shape[3], axis=3)
        found = jnp.maximum(known, found)
        return lax.dynamic_update_slice_in_dim(maxima, found, slot, axis=3)

    shape = (*heads[:2], queries.blocks_in_tile, plan.keys.slots)
    return lax.fori_loop(start, stop, read_tile, jnp.zeros(shape, dtype))


def _mask(plan: _Plan, rows: _Rows, tile: _Keys) -> Mask:
    """Returns [l, 1, Q, p] with l = L or 1: which pairs are visible."""
    mask = plan.geometry.pairs(rows.position[:, None], tile.position)[None, None]
    if rows.segments is None or tile.segments is None:
        return mask
    return mask & (rows.segments[..., None] == tile.segments[:, None, None])
