"""Absolute stripes, gathered before the kernels see them.

A list of tiles of 512 keys skips nothing of a pattern that keeps every eighth block of
64 tokens. But absolute stripes stand at the same keys for all queries: the striped
blocks of a head, S / stride tokens, are cut out once, and attention splits in two,

    the band        m - n < left   over all keys,
    the stripes     m - n >= left  over the gathered keys, a staircase without triangles,

both of which are dense in large tiles. The log-sum-exp puts them together.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.pallas_tpu import lists, tuning
from pallas_kernels.rules import Strided
from pallas_kernels.targets import Target


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Two calls with the same queries, whose keys make up those of one call."""

    band: Call
    stripes: Call


def split(call: Call) -> Parts | None:
    """Returns the parts of a call with absolute stripes; None where they do not apply.

    They need a causal rule whose lists are known on the host, no window and no
    segments, and queries that start at a block and end no later than the keys.
    """
    rule = _rule(call)
    if rule is None:
        return None
    size, stride = rule.block_size, rule.stride
    queries, keys = call.block_mask.query_length, call.block_mask.key_length
    offset = int(call.block_mask.query_offset)
    heads = np.arange(rule.pattern_heads)
    query_block = (np.arange(-(-queries // size)) + offset // size)[:, None]
    key_block = np.arange(-(-keys // size))
    is_dense = (heads >= len(heads) - rule.dense_heads)[:, None, None]
    is_near = query_block - key_block < rule.left
    # One pattern for all heads, unless some are dense.
    band = (is_near | is_dense)[: len(heads) if rule.dense_heads else 1]
    phases = _phases(rule)
    gathered = phases[:, None, None] + np.arange(-(-len(key_block) // stride)) * stride
    staircase = (query_block - gathered >= rule.left) & ~is_dense
    stripes = BlockMask.from_block_map(
        staircase, queries, gathered.shape[-1] * size, size, size, is_causal=False, query_offset=0
    )
    phases = phases.repeat(call.query.shape[2] // len(heads))
    return Parts(
        dataclasses.replace(
            call,
            block_mask=BlockMask.from_block_map(
                band, queries, keys, size, size, is_causal=True, query_offset=offset
            ),
        ),
        dataclasses.replace(
            call,
            key=_gather(call.key, phases, size, stride),
            value=_gather(call.value, phases, size, stride),
            block_mask=stripes,
        ),
    )


def is_faster(parts: Parts, call: Call) -> bool:
    """Returns whether the parts take fewer or smaller tiles than the lists of the call."""
    whole = tuning.choose(call)
    pieces = [tuning.choose(part) for part in (parts.band, parts.stripes)]
    if whole is None or None in pieces:
        return False
    return sum(piece.cost for piece in pieces if piece) < whole.cost


def attend(parts: Parts, target: Target) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse) of both parts together."""
    near, near_lse = lists.attend(parts.band, target)
    far, far_lse = lists.attend(parts.stripes, target)
    # Every query sees its own key in the band: its lse is finite.
    peak = lax.stop_gradient(jnp.maximum(near_lse, far_lse))
    near_weight, far_weight = jnp.exp(near_lse - peak), jnp.exp(far_lse - peak)
    total = near_weight + far_weight
    out = near * (near_weight / total)[..., None] + far * (far_weight / total)[..., None]
    return out.astype(near.dtype), peak + jnp.log(total)


def _rule(call: Call) -> Strided | None:
    block_mask, rule = call.block_mask, call.block_mask.rule
    arrays = (block_mask.kv_counts, block_mask.query_offset)
    is_known = all(isinstance(array, np.ndarray) for array in arrays)
    if not isinstance(rule, Strided) or rule.stripes != "absolute" or not is_known:
        return None
    geometry = block_mask.geometry
    is_plain = geometry.is_causal and not geometry.prefix_length and not geometry.is_anticausal
    is_plain &= geometry.window_size is None and call.segment_ids is None
    offset = int(block_mask.query_offset)
    fits = 0 <= offset <= geometry.default_offset and offset % rule.block_size == 0
    return rule if is_plain and fits and block_mask.is_uniform else None


def _phases(rule: Strided) -> Int[np.ndarray, "Hp"]:
    """Returns the first striped block of each pattern head."""
    sparse = dataclasses.replace(rule, dense_heads=0)
    heads, blocks = np.arange(rule.pattern_heads)[:, None], np.arange(rule.stride)
    # So far ahead that the band is left behind.
    return np.asarray(sparse.visible(heads, blocks + rule.left, blocks)).argmax(-1)


def _gather(
    array: Float[Array, "B S K H"], phases: Int[np.ndarray, "N"], size: int, stride: int
) -> Float[Array, "B P L H"]:
    """Returns the blocks phase, phase + stride, ... of every head, L = K or N heads.

    Splits, unlike indices, have a transpose that adds nothing up.
    """
    batch, length, kv_heads, head_dim = array.shape
    by_group = phases.reshape(kv_heads, -1)
    if (by_group == by_group[:, :1]).all():
        by_group = by_group[:, :1]
    padding = -length % (size * stride)
    array = jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = array.reshape(batch, -1, stride, size, kv_heads, head_dim)
    gathered = [
        lax.split(head, (phase, 1, stride - phase - 1), axis=2)[1]
        for head, phases in zip(lax.split(blocks, [1] * kv_heads, axis=4), by_group, strict=True)
        for phase in phases.tolist()
    ]
    return jnp.concatenate(gathered, axis=4).reshape(batch, -1, len(gathered), head_dim)
