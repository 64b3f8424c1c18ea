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
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import tiles
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.pallas_tpu import lists, tile, tuning
from pallas_kernels.rules import Strided
from pallas_kernels.targets import Target

_Phases = Int[np.ndarray, "L"] | Int[Array, "L"]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What the two parts of a call attend to.

    Attributes:
        band: blocks of all keys.
        stripes: blocks of the gathered keys.
        phases: the first block that is gathered for each head, L = max(Hp, K) of them;
            traced where a device holds some of the heads.
        rule: the pattern of the call.
    """

    band: BlockMask
    stripes: BlockMask
    phases: _Phases
    rule: Strided

    def gathered(self, call: Call) -> Call:
        """Returns the call with the striped keys of each head, values and ids alike."""
        segment_ids = call.segment_ids
        if segment_ids is not None:
            query_ids, key_ids = segment_ids
            # Stripes of other phases have other ids.
            by_head = _gather(key_ids[..., None, None], self.phases, self.rule)[..., 0]
            segment_ids = (query_ids, by_head.swapaxes(1, 2))
        return dataclasses.replace(
            call,
            key=_gather(call.key, self.phases, self.rule),
            value=_gather(call.value, self.phases, self.rule),
            block_mask=self.stripes,
            segment_ids=segment_ids,
        )


def split(call: Call) -> Parts | None:
    """Returns the parts of a call with absolute stripes; None where they do not apply.

    They need a causal rule, no window, and queries that are known on the host to start at
    a block and end no later than the keys.
    """
    rule = _rule(call)
    if rule is None:
        return None
    size, stride = rule.block_size, rule.stride
    queries, keys = call.block_mask.query_length, call.block_mask.key_length
    offset = int(call.block_mask.query_offset)
    heads = call.block_mask.head_numbers
    query_block = (np.arange(-(-queries // size)) + offset // size)[:, None]
    key_block = np.arange(-(-keys // size))
    is_dense = np.zeros((1, 1, 1), bool)
    if rule.dense_heads:
        is_dense = (heads >= rule.pattern_heads - rule.dense_heads)[:, None, None]
    is_near = query_block - key_block < rule.left
    phases = tiles.namespace(heads).asarray(_phases(rule))[heads]
    gathered = phases[:, None, None] + np.arange(-(-len(key_block) // stride)) * stride
    staircase = (gathered <= query_block - rule.left) & ~is_dense
    return Parts(
        BlockMask.from_block_map(
            is_near | is_dense, queries, keys, size, size, is_causal=True, query_offset=offset
        ),
        BlockMask.from_block_map(
            staircase,
            *(queries, gathered.shape[-1] * size, size, size),
            is_causal=False,
            query_offset=0,
        ),
        phases.repeat(max(len(heads), call.key.shape[2]) // len(heads)),
        rule,
    )


def is_faster(parts: Parts, call: Call) -> bool:
    """Returns whether the parts take fewer or smaller tiles than the lists of the call."""
    masks = (parts.band, parts.stripes)
    whole = tuning.choose(call)
    pieces = [tuning.choose(dataclasses.replace(call, block_mask=mask)) for mask in masks]
    if whole is None or None in pieces:
        return False
    return sum(piece.cost for piece in pieces if piece) < whole.cost


def attend(
    parts: Parts, call: Call, target: Target
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns (out, lse) of both parts together."""
    near, near_lse = lists.attend(dataclasses.replace(call, block_mask=parts.band), target)
    far, far_lse = lists.attend(parts.gathered(call), target)
    # Finite, so that a row which sees nothing has weights of 0, and not NaN.
    peak = lax.stop_gradient(jnp.maximum(jnp.maximum(near_lse, far_lse), tile.LEAST))
    near_weight, far_weight = jnp.exp(near_lse - peak), jnp.exp(far_lse - peak)
    total = near_weight + far_weight
    is_empty = total == 0
    divisor = jnp.where(is_empty, 1, total)
    out = near * (near_weight / divisor)[..., None] + far * (far_weight / divisor)[..., None]
    return out.astype(near.dtype), jnp.where(is_empty, -jnp.inf, peak + jnp.log(divisor))


def _rule(call: Call) -> Strided | None:
    block_mask, rule = call.block_mask, call.block_mask.rule
    is_known = isinstance(block_mask.query_offset, np.ndarray)
    if not isinstance(rule, Strided) or rule.stripes != "absolute" or not is_known:
        return None
    if block_mask.head_numbers.ndim > 1:
        return None
    geometry = block_mask.geometry
    is_plain = geometry.is_causal and not geometry.prefix_length and not geometry.is_anticausal
    is_plain &= geometry.window_size is None and block_mask.is_uniform
    offset = int(block_mask.query_offset)
    fits = 0 <= offset <= geometry.default_offset and offset % rule.block_size == 0
    return rule if is_plain and fits else None


def _phases(rule: Strided) -> Int[np.ndarray, "Hp"]:
    """Returns the first striped block of each pattern head."""
    sparse = dataclasses.replace(rule, dense_heads=0)
    heads, blocks = np.arange(rule.pattern_heads)[:, None], np.arange(rule.stride)
    # So far ahead that the band is left behind.
    return np.asarray(sparse.visible(heads, blocks + rule.left, blocks)).argmax(-1)


def _gather(
    array: Shaped[Array, "B S K H"], phases: _Phases, rule: Strided
) -> Shaped[Array, "B P L H"]:
    """Returns the blocks phase, phase + stride, ... of every head, K of which serve L.

    Splits and slices, unlike indices, have a transpose that adds nothing up.
    """
    batch, length, kv_heads, head_dim = array.shape
    size, stride = rule.block_size, rule.stride
    padding = -length % (size * stride)
    array = jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = array.reshape(batch, -1, stride, size, kv_heads, head_dim)
    by_head = zip(
        lax.split(blocks, [1] * kv_heads, axis=4), phases.reshape(kv_heads, -1), strict=True
    )
    gathered = [
        lax.dynamic_slice_in_dim(head, phase, 1, axis=2)
        for head, phases in by_head
        for phase in phases
    ]
    return jnp.concatenate(gathered, axis=4).reshape(batch, -1, len(gathered), head_dim)
