"""What every hardware kernel must compute: cases, and the comparison with `reference`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockMask, Dense, Local, Strided
from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.call import Call
from pallas_kernels.block_sparse_attention.scores import Scores
from pallas_kernels.targets import Target

NAMES = ("out", "lse", "d_query", "d_key", "d_value")


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison; the mask is made by `block_mask`."""

    block_mask: Callable[[], BlockMask]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    segments: int = 0
    soft_cap: float | None = None
    scale: float | None = None
    dtype: Any = jnp.float32


def random_map(*shape: int) -> np.ndarray:
    """A selection of blocks without any order, with rows that see nothing."""
    block_map = np.random.default_rng(7).random(shape) < 0.4
    block_map[..., 1, :] = False
    return block_map


def _random(shape, queries, keys, size, key_size=None, **limits):
    limits = {"is_causal": False} | limits
    return lambda: BlockMask.from_block_map(
        random_map(*shape), queries, keys, size, key_size or size, **limits
    )


def _rule(rule, *lengths, **limits):
    limits = {"is_causal": True} | limits
    return lambda: BlockMask.from_rule(rule, *lengths, **limits)


CASES = {
    "dense_causal": Case(_rule(Dense(), 256)),
    "dense_longer_keys": Case(_rule(Dense(), 100, 230), heads=4, kv_heads=2),
    "dense_longer_queries": Case(_rule(Dense(), 230, 100)),
    "random_ragged": Case(_random((1, 4, 5), 200, 300, 64), heads=4, kv_heads=2),
    "random_fine": Case(_random((2, 13, 13), 200, 200, 16), heads=2, kv_heads=2),
    "random_coarse": Case(_random((1, 2, 2), 500, 500, 256, is_causal=True)),
    "random_rectangles": Case(_random((1, 7, 3), 200, 180, 32, 64, is_causal=True)),
    "pattern_per_query_head": Case(
        _random((4, 4, 4), 256, 256, 64, is_causal=True), heads=4, kv_heads=2
    ),
    "pattern_per_batch": Case(_random((2, 2, 4, 4), 250, 256, 64), 2, heads=4, kv_heads=2),
    "window": Case(_random((1, 4, 4), 256, 256, 64, is_causal=True, window_size=75)),
    "prefix": Case(_rule(Local(64, left=2, right=9), 250, prefix_length=130), heads=4, kv_heads=2),
    "prefix_dense": Case(_rule(Dense(), 230, 230, 64, 64, prefix_length=100)),
    "transposed": Case(
        lambda: BlockMask.from_rule(Dense(), 256, 200, 64, 64, is_causal=True).transpose()
    ),
    "segments": Case(
        _rule(Local(64, left=3), 250), batch=2, heads=2, kv_heads=1, segments=3, soft_cap=1.5
    ),
    "segments_bidirectional": Case(
        _rule(Dense(), 250, 130, is_causal=False), batch=2, segments=4, scale=0.3
    ),
    "strided": Case(_rule(Strided(64, 4, 4, left=1), 500), heads=4, kv_heads=4),
    "strided_groups": Case(
        _rule(Strided(32, 3, 4, left=2, dense_heads=1), 320), heads=4, kv_heads=2
    ),
    "chunk": Case(_rule(Strided(64, 2, 2, left=1), 128, 384, query_offset=128), kv_heads=2),
    "nothing": Case(_random((1, 2, 2), 65, 128, 64, 64, query_offset=-200, is_causal=True)),
    "head_dim_80": Case(_rule(Local(64, left=2), 192), head_dim=80, soft_cap=2.0),
    "head_dim_128": Case(_rule(Local(64, left=2), 192), head_dim=128),
    "bfloat16": Case(_rule(Local(64, left=2), 192), dtype=jnp.bfloat16),
    "float16": Case(_rule(Dense(), 192), dtype=jnp.float16),
}


def make(case: Case) -> Call:
    """Returns the call of a case, with random arrays."""
    rng = np.random.default_rng(0)
    block_mask = case.block_mask()
    queries, keys = block_mask.query_length, block_mask.key_length
    shapes = [(queries, case.heads), (keys, case.kv_heads), (keys, case.kv_heads)]
    arrays = [
        jnp.asarray(rng.standard_normal((case.batch, *shape, case.head_dim)), case.dtype)
        for shape in shapes
    ]
    segment_ids = None
    if case.segments:
        segment_ids = tuple(
            jnp.asarray(np.sort(rng.integers(0, case.segments, (case.batch, n))), jnp.int32)
            for n in (queries, keys)
        )
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return Call(*arrays, block_mask, segment_ids, Scores(scale, case.soft_cap), True)


def results(attend: Callable[[Call], tuple], call: Call, arrays: tuple | None = None) -> tuple:
    """Returns out, lse and the gradients of a random mix of both outputs.

    arrays takes the place of query, key and value.
    """
    rng = np.random.default_rng(1)

    def outputs(query, key, value):
        return attend(dataclasses.replace(call, query=query, key=key, value=value))

    shape = call.query.shape
    cotangents = (
        jnp.asarray(rng.standard_normal(shape), call.query.dtype),
        jnp.asarray(rng.standard_normal(shape[:3]), jnp.promote_types(call.query.dtype, "float32")),
    )

    @jax.jit
    def run(*arrays):
        values, pull = jax.vjp(outputs, *arrays)
        return (*values, *pull(cotangents))

    return run(*(arrays or (call.query, call.key, call.value)))


def expected(call: Call, attend: Callable[..., tuple] = reference.attend) -> tuple:
    """Returns the results of `reference`, or of another function like it, in float64."""
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (call.query, call.key, call.value)]
        names = ("query", "key", "value")
        call = dataclasses.replace(call, **dict(zip(names, wide, strict=True)))
        return results(lambda call: attend(call, Target("cpu")), call)


def assert_agree(actual: tuple, truth: tuple, dtype: Any) -> None:
    """Compares up to a few roundings of the dtype, relative to the largest value."""
    tolerance = 1e-5 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    for name, one, other in zip(NAMES, actual, truth, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert not np.isnan(one).any(), name
        scale = max(1.0, np.abs(other[np.isfinite(other)]).max(initial=0))
        np.testing.assert_allclose(one, other, atol=tolerance * scale, rtol=tolerance, err_msg=name)
