import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    BlockMask,
    Dense,
    block_max_attention,
    block_sparse_attention,
    targets,
)
from pallas_kernels.targets import Target

jitted = jax.jit(
    block_max_attention,
    static_argnames=(
        "query_block_size",
        "key_block_size",
        "is_causal",
        "window_size",
        "prefix_length",
        "scale",
        "logits_soft_cap",
        "group_reduction",
        "implementation",
    ),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one comparison."""

    queries: int
    keys: int
    query_block_size: int | None
    key_block_size: int
    is_causal: bool = True
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    segments: int = 0
    dtype: Any = np.float32
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self):
        return {
            "query_block_size": self.query_block_size,
            "key_block_size": self.key_block_size,
            "is_causal": self.is_causal,
            **self.options,
        }


CASES = {
    "square": Case(64, 64, 16, 16),
    "ragged": Case(75, 75, 16, 32, batch=2),
    "rows": Case(70, 70, None, 16),
    "longer_keys": Case(37, 90, 8, 16),
    "longer_queries": Case(90, 37, 16, 8, heads=2, kv_heads=2),
    "bidirectional": Case(40, 50, 16, 8, is_causal=False),
    "blocks_of_odd_sizes": Case(100, 90, 12, 10, kv_heads=1),
    "blocks_of_many_tiles": Case(1100, 1100, 700, 600, heads=1, kv_heads=1),
    "large_blocks": Case(300, 520, 64, 200, heads=2, kv_heads=1),
    "many_tiles": Case(600, 1300, 32, 64, heads=2, kv_heads=1, head_dim=8),
    "many_small_blocks": Case(130, 700, None, 4, heads=2, kv_heads=1, head_dim=8),
    "one_block": Case(20, 20, 64, 64),
    "window": Case(80, 80, 16, 16, options={"window_size": 21}),
    "window_of_rows": Case(50, 80, None, 8, options={"window_size": 9, "query_offset": 11}),
    "prefix": Case(60, 70, 8, 16, options={"prefix_length": 37}),
    "prefix_in_window": Case(60, 60, 8, 8, options={"prefix_length": 30, "window_size": 11}),
    "segments": Case(75, 75, 16, 16, batch=2, segments=3),
    "segments_bidirectional": Case(60, 75, 16, 16, False, batch=2, segments=4),
    "soft_cap": Case(64, 64, 16, 16, options={"logits_soft_cap": 0.7, "scale": 0.5}),
    "soft_cap_of_rows": Case(30, 40, None, 8, options={"logits_soft_cap": 0.7}),
    "empty_rows": Case(40, 40, 8, 8, options={"query_offset": -19}),
    "nothing_visible": Case(24, 24, 8, 8, options={"query_offset": -60, "logits_soft_cap": 1.0}),
    "keys_far_behind": Case(24, 24, 8, 8, options={"query_offset": 500, "window_size": 8}),
    "over_group": Case(64, 64, 16, 16, heads=6, options={"group_reduction": "max"}),
    "over_group_rows": Case(
        45, 45, None, 16, batch=2, heads=4, kv_heads=1, options={"group_reduction": "max"}
    ),
    "over_group_many_tiles": Case(
        600, 600, 300, 16, heads=4, segments=2, options={"group_reduction": "max"}
    ),
    "bfloat16": Case(64, 64, 16, 16, dtype=jnp.bfloat16),
    "float16": Case(64, 64, None, 16, dtype=jnp.float16),
}


def make(case):
    """Returns query, key and segment_ids of a case."""
    rng = np.random.default_rng(0)
    query, key = (
        jnp.asarray(2 * rng.standard_normal((case.batch, *shape, case.head_dim)), case.dtype)
        for shape in ((case.queries, case.heads), (case.keys, case.kv_heads))
    )
    if not case.segments:
        return query, key, None
    ids = [rng.integers(0, case.segments, (case.batch, n)) for n in (case.queries, case.keys)]
    return query, key, tuple(jnp.asarray(np.sort(x), jnp.int32) for x in ids)


def truth(case, query, key, segment_ids):
    """Returns (maxima, lse) from float64 weights and a loop over blocks."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    group = case.heads // case.kv_heads
    options = case.options
    logits = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, group, axis=2))
    logits *= options.get("scale", case.head_dim**-0.5)
    cap = options.get("logits_soft_cap")
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    i = np.arange(case.queries)[:, None] + options.get("query_offset", case.keys - case.queries)
    j = np.arange(case.keys)
    mask = np.ones(logits.shape, bool)
    mask &= (j <= i) | (j < options.get("prefix_length", 0)) | (not case.is_causal)
    mask &= abs(i - j) < options.get("window_size", 10**9)
    if segment_ids is not None:
        ids = [np.asarray(x) for x in segment_ids]
        mask &= ids[0][:, None, :, None] == ids[1][:, None, None]
    exponentials = np.where(mask, np.exp(logits), 0)
    total = exponentials.sum(-1)
    weights = exponentials / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        lse = np.log(total).swapaxes(1, 2)
    size = (case.query_block_size or 1, case.key_block_size)
    maxima = np.stack(
        [
            np.stack(
                [
                    weights[:, :, m : m + size[0], n : n + size[1]].max((2, 3))
                    for n in range(0, case.keys, size[1])
                ],
                axis=-1,
            )
            for m in range(0, case.queries, size[0])
        ],
        axis=-2,
    )
    if options.get("group_reduction") == "max":
        maxima = maxima.reshape(case.batch, case.kv_heads, group, *maxima.shape[2:]).max(2)
    return maxima, lse


def assert_agree(case, actual, expected):
    assert actual.dtype == jnp.promote_types(case.dtype, jnp.float32)
    assert actual.shape == expected.shape
    tolerance = 1e-12 if actual.dtype == np.float64 else 3e-6
    np.testing.assert_allclose(actual, expected, rtol=10 * tolerance, atol=tolerance)


def run(case, implementation, dtype=None):
    query, key, segment_ids = make(case)
    expected, lse = truth(case, query, key, segment_ids)
    query, key = (x if dtype is None else x.astype(dtype) for x in (query, key))
    lse = jnp.asarray(lse, jnp.promote_types(query.dtype, jnp.float32))
    options = {"segment_ids": segment_ids, "implementation": implementation}
    return jitted(query, key, lse, **options, **case.arguments()), expected


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_plain_jax(name, implementation):
    with jax.enable_x64(True):
        actual, expected = run(CASES[name], implementation, np.float64)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)


# What the kernel could do differently: the rest is one code for all.
@pytest.mark.parametrize(
    "name",
    [
        "ragged",
        "rows",
        "longer_keys",
        "blocks_of_odd_sizes",
        "blocks_of_many_tiles",
        "large_blocks",
        "many_tiles",
        "many_small_blocks",
        "window_of_rows",
        "prefix_in_window",
        "segments_bidirectional",
        "soft_cap",
        "empty_rows",
        "nothing_visible",
        "over_group_many_tiles",
        "bfloat16",
        "float16",
    ],
)
@pytest.mark.representative(
    "ragged",
    "rows",
    "prefix_in_window",
    "segments_bidirectional",
    "over_group_many_tiles",
    "bfloat16",
)
def test_tpu_kernel(name):
    with targets.use(Target("tpu", interpret=True)):
        assert_agree(CASES[name], *run(CASES[name], "pallas_tpu"))


@pytest.mark.parametrize("name", ["blocks_of_many_tiles", "segments", "over_group_rows"])
@pytest.mark.usefixtures("no_races")
def test_tpu_kernel_in_simulated_memory(name):
    """Buffers start as NaN here, and races are errors."""
    with targets.use(Target("tpu", interpret=pltpu.InterpretParams(detect_races=True))):
        assert_agree(CASES[name], *run(CASES[name], "pallas_tpu"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_of_xla(dtype):
    case = dataclasses.replace(CASES["ragged"], dtype=dtype)
    assert_agree(case, *run(case, "xla"))


def test_programs_side_by_side(monkeypatch):
    """As on accelerators: a CPU computes them one by one."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    case = dataclasses.replace(CASES["over_group_many_tiles"], batch=3)
    assert_agree(case, *run(case, "xla"))


@pytest.mark.parametrize("query_block_size", [None, 32])
def test_lse_of_block_sparse_attention(query_block_size):
    """Rows that see nothing have lse -inf, and weights 0."""
    case = Case(120, 90, query_block_size, 16, dtype=jnp.bfloat16)
    query, key, _ = make(case)
    expected, _ = truth(case, query, key, None)
    dense = BlockMask.from_rule(Dense(), case.queries, case.keys, is_causal=True)
    _, lse = jax.jit(
        lambda query, key: block_sparse_attention(
            query, key, key, dense, is_causal=True, return_lse=True, implementation="xla"
        )
    )(query, key)
    assert np.isneginf(lse).any()
    actual = jitted(query, key, lse, **case.arguments())
    np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_traced_offset_and_vmap(implementation):
    case = Case(24, 80, 8, 16, heads=2, kv_heads=1)
    query, key, _ = make(case)
    lse = jnp.zeros(query.shape[:3])

    def one(query, offset, name=implementation):
        options = {"query_offset": offset, "implementation": name}
        return block_max_attention(query, key, lse, **options, **case.arguments())

    queries, offsets = jnp.stack([query, -query, 2 * query]), jnp.asarray([-3, 17, 56])
    run = jax.jit(one)
    reference = jax.jit(functools.partial(one, name="reference"))
    with targets.use(Target("tpu", interpret=True)):
        one_by_one = [run(*x) for x in zip(queries, offsets, strict=True)]
        one_offset = jax.jit(jax.vmap(one, (0, None)))(queries, offsets[1])
    assert run._cache_size() == 1
    for i, (query, offset) in enumerate(zip(queries, offsets, strict=True)):
        np.testing.assert_allclose(one_by_one[i], reference(query, offset), rtol=1e-4)
        np.testing.assert_allclose(one_offset[i], reference(query, offsets[1]), rtol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_a_target_has_no_gradient(implementation):
    case = CASES["square"]
    query, key, _ = make(case)

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def loss(*arrays):
        maxima = block_max_attention(*arrays, implementation=implementation, **case.arguments())
        return jnp.sum(maxima**2)

    with targets.use(Target("tpu", interpret=True)):
        value, gradients = jax.jit(loss)(query, key, jnp.zeros(query.shape[:3]))
    assert value > 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("query_block_size", [64, None])
def test_memory_grows_with_tokens(query_block_size):
    """Besides the result, which is of size M * J."""

    def temporary(length):
        query, key, lse = (
            jax.ShapeDtypeStruct((1, length, *heads), jnp.float32)
            for heads in ((2, 64), (1, 64), (2,))
        )
        options = {"query_block_size": query_block_size, "key_block_size": 64}
        compiled = jitted.lower(query, key, lse, is_causal=True, **options).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes - 2 * memory.output_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    assert long < 4.5 * max(short, 2**22)
    assert long < 16384**2 // 8


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


BAD_CALLS = {
    "query has shape .*pass \\[batch, length": {"query": zeros(16, 2, 8)},
    "query has shape \\(0, 16, 2, 8\\)": dict.fromkeys(("query", "key"), zeros(0, 16, 2, 8)),
    "key has shape \\(1, 0, 2, 8\\): pass": {"key": zeros(1, 0, 2, 8)},
    "key is NoneType: pass an array": {"key": None},
    "lse is NoneType: pass an array": {"lse": None},
    "key is bfloat16, query float32: cast": {"key": zeros(1, 16, 2, 8, dtype=jnp.bfloat16)},
    "key heads that divide": {"query": zeros(1, 16, 3, 8)},
    "lse is float32\\[1, 2, 16\\], query has shape": {"lse": zeros(1, 2, 16)},
    "lse is int32\\[1, 16, 2\\], query has": {"lse": zeros(1, 16, 2, dtype=jnp.int32)},
    "segment_ids are \\(int32\\[1, 16\\], int32\\[1, 9\\]\\)": {
        "segment_ids": (zeros(1, 16, dtype=jnp.int32), zeros(1, 9, dtype=jnp.int32))
    },
    "segment_ids are \\(float32\\[1, 16\\]": {"segment_ids": (zeros(1, 16),) * 2},
    "segment_ids are \\(int32\\[1, 16\\]\\): pass": {
        "segment_ids": (zeros(1, 16, dtype=jnp.int32),)
    },
    "segment_ids are int32\\[1, 16\\]: pass": {"segment_ids": zeros(1, 16, dtype=jnp.int32)},
    "query_block_size=0 must be at least 1": {"query_block_size": 0},
    "key_block_size=-4 must be at least 1": {"key_block_size": -4},
    "key_block_size=None must be an integer": {"key_block_size": None},
    "window_size=0 must be at least 1": {"window_size": 0},
    "window_size=3.5 must be an integer": {"window_size": 3.5},
    "prefix_length=1.5 must be an integer": {"prefix_length": 1.5},
    "is_causal=None must be True or False": {"is_causal": None},
    "query_offset is 1.5: pass one integer": {"query_offset": 1.5},
    "scale=-1.0 must be positive": {"scale": -1.0},
    "scale=nan must be a finite": {"scale": float("nan")},
    "scale=float32\\[2\\] must be a finite": {"scale": np.ones(2, np.float32)},
    "logits_soft_cap=0.0 must be positive": {"logits_soft_cap": 0.0},
    "logits_soft_cap=nan must be positive": {"logits_soft_cap": float("nan")},
    "group_reduction='mean' must be 'max' or None": {"group_reduction": "mean"},
    "implementation='cudnn' must name one": {"implementation": "cudnn"},
    "implementation=\\('xla', 3\\) must name one": {"implementation": ("xla", 3)},
}


def call_with(**change):
    array = zeros(1, 16, 2, 8)
    arguments = {
        "query": array,
        "key": array,
        "lse": zeros(1, 16, 2),
        "query_block_size": 8,
        "key_block_size": 8,
        "is_causal": True,
    } | change
    return block_max_attention(**arguments)


@pytest.mark.parametrize(("message", "change"), BAD_CALLS.items(), ids=BAD_CALLS)
def test_bad_input(message, change, untyped):
    with pytest.raises(ValueError, match=message) as error:
        call_with(**change)
    assert "\n" not in str(error.value)


def test_what_cannot_run_says_why(untyped):
    with pytest.raises(NotImplementedError, match="^pallas_tpu: needs a TPU, not cpu; none can"):
        call_with(implementation="pallas_tpu")
    with jax.enable_x64(True), targets.use(Target("tpu")):
        array = zeros(1, 16, 2, 8, dtype=jnp.float64)
        with pytest.raises(NotImplementedError, match="no float64: cast query and key"):
            call_with(query=array, key=array, implementation=["pallas_tpu"])
