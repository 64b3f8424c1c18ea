"""S2-Attention against the vectors of the official DKernel and of FlexAttention.

Everything comes from the files: other shapes, seeds and settings pass unchanged.
"""

import jax
import numpy as np
import pytest

from pallas_kernels import BlockMask, Strided, block_sparse_attention, kernel_tables, targets
from pallas_kernels.block_mask import FULL
from pallas_kernels.kernel_tables import Tiling
from pallas_kernels.targets import Target
from tests.golden import loading
from tests.pallas_kernels import gpu_interpreter, kernel_cases

SETTINGS = loading.settings("s2")
LAYOUTS = loading.arrays("s2", "layouts.npz")
ATTENTION = loading.arrays("s2", "attention.npz")
TABLES = loading.arrays("s2", "block_tables.npz")


def by_key(cases):
    return pytest.mark.parametrize("case", cases, ids=[case["key"] for case in cases])


def strided(args, key_start=0):
    """Returns the rule of DKernel's arguments; keys may start at a block's position."""
    local = args["local_blocks"]
    left, right = local if isinstance(local, list) else (local, local)
    # Bidirectional stripes are relative unless told otherwise, causal ones never are.
    stripes = args.get("vert_position_type", "relative")
    block_size = args.get("block_size", args.get("sparse_block_size"))
    return Strided(
        block_size,
        args["vert_stride"],
        num_heads=args.get("num_heads", args.get("heads")),
        num_kv_heads=args.get("num_kv_heads"),
        left=left,
        right=right,
        offset=args.get("head_sliding_offset", 0) + key_start // block_size,
        step=args.get("head_sliding_step"),
        dense_heads=args.get("num_dense_heads", 0),
        homo_head=args.get("homo_head", False),
        phase_by="kv_head" if "num_kv_heads" in args else "q_head",
        stripes="absolute" if args.get("causal", True) else stripes,
    )


def layout_mask(case):
    args = dict(case["args"])
    # Phi-3-small's rule as its serving code states it.
    offset = case.get("equals_dkernel_head_sliding_offset")
    if offset is not None:
        args["head_sliding_offset"] = offset
    past = args.get("past_len", 0)
    query_start = -(-past // args["block_size"]) * args["block_size"]
    key_start = args.get("kv_start_position", 0)
    return BlockMask.from_rule(
        strided(args, key_start),
        args["seqlen"] - query_start,
        args.get("kv_seqlen", args["seqlen"]),
        is_causal=args.get("causal", True),
        query_offset=args.get("q_start_position", query_start) - key_start,
    )


def per_stored_pattern(table, case):
    """Returns the rows of a table for the patterns that the file holds."""
    patterns = case["block_mask_shape"][0]
    if "heads_kept" in case:
        rows = np.asarray(case["heads_kept"])
        return table[rows * len(table) // case["args"]["num_heads"]]
    return np.repeat(table, patterns // len(table), axis=0)


@by_key(SETTINGS["layouts"])
def test_layout(case):
    block_mask = layout_mask(case)
    packed = LAYOUTS[f"{case['key']}_block_mask"]
    expected = loading.unpack_bits(packed, case["block_mask_shape"][-1])
    actual = per_stored_pattern(np.asarray(block_mask.block_map()), case)
    np.testing.assert_array_equal(actual, expected)
    counts = case["active_blocks_per_pattern"]
    actual = per_stored_pattern(block_mask.kv_counts.sum(-1), case)
    np.testing.assert_array_equal(actual, counts)
    dense = case.get("causal_total_blocks")
    if dense is not None and "heads_kept" not in case:
        assert block_mask.density() == pytest.approx(np.mean(counts) / dense)


@by_key([case for case in SETTINGS["layouts"] if f"{case['key']}_crow" in LAYOUTS])
@pytest.mark.parametrize(
    ("starts", "columns", "table"), [("crow", "col", "kv"), ("ccol", "row", "q")]
)
def test_compressed_lists(case, starts, columns, table):
    key = case["key"]
    block_mask = layout_mask(case)
    counts = per_stored_pattern(getattr(block_mask, f"{table}_counts"), case)
    indices = per_stored_pattern(getattr(block_mask, f"{table}_indices"), case)
    np.testing.assert_array_equal(counts, np.diff(LAYOUTS[f"{key}_{starts}"]))
    listed = np.arange(indices.shape[-1]) < counts[..., None]
    for pattern, expected in enumerate(LAYOUTS[f"{key}_{columns}"]):
        np.testing.assert_array_equal(indices[pattern][listed[pattern]], expected[expected >= 0])


@by_key([case for case in SETTINGS["layouts"] if "kv_cache_efficient" in case])
def test_kv_cache_efficient(case):
    """A column is efficient when the query blocks that read it have no gap."""
    block_mask = layout_mask(case)
    read = per_stored_pattern(np.asarray(block_mask.block_map()), case)
    dropped_then_back = (np.diff(read.astype(int), axis=1) > 0).sum(1) + read[:, 0]
    assert bool((dropped_then_back <= 1).all()) == case["kv_cache_efficient"]


def attention_mask(case):
    # The lists end with the arrays, not with the length the layout was made for.
    return BlockMask.from_rule(strided(case), case["seqlen"], is_causal=case.get("causal", True))


@by_key(SETTINGS["attention"])
def test_token_mask(case):
    packed = ATTENTION[f"{case['key']}_mask"]
    expected = loading.unpack_bits(packed, case["seqlen"])
    actual = np.asarray(attention_mask(case).to_dense())
    np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)


def attention_results(case, implementation, *inputs):
    """Returns output, lse and gradients from queries, keys, values and d_out."""
    block_mask, is_causal = attention_mask(case), case.get("causal", True)

    @jax.jit
    def outputs_and_gradients(q, k, v, d_out):
        def attend(q, k, v):
            return block_sparse_attention(
                q,
                k,
                v,
                block_mask,
                is_causal=is_causal,
                scale=case["sm_scale"],
                implementation=implementation,
                return_lse=True,
            )

        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, lse.swapaxes(1, 2), *pull((d_out, lse * 0))

    return outputs_and_gradients(*inputs)


def attention_inputs(case, dtype=np.float32):
    return [ATTENTION[f"{case['key']}_{name}"].astype(dtype) for name in ("q", "k", "v", "do")]


def compare_attention(case, implementation):
    """Compares results with those of the official kernels."""
    results = attention_results(case, implementation, *attention_inputs(case))
    official = case["max_abs_diff_vs_float64_dense_reference"]
    for name, result in zip(("out", "lse", "dq", "dk", "dv"), results, strict=True):
        stored = ATTENTION[f"{case['key']}_{name}"]
        np.testing.assert_allclose(
            result, stored, rtol=1e-5, atol=1e-5 + official[name], err_msg=name
        )


@by_key(SETTINGS["attention"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_attention(case, implementation):
    """Triton's kernels have an interpreter of their own, and so a test of their own."""
    compare_attention(case, implementation)


@by_key(SETTINGS["attention"])
@pytest.mark.representative("A00", "A04")
def test_attention_on_tpu(case):
    with targets.use(Target("tpu", interpret=True)):
        compare_attention(case, "pallas_tpu")


@by_key(SETTINGS["attention"])
@pytest.mark.representative("A03")
def test_attention_on_hopper(case, monkeypatch):
    """In float16, against what the rounded inputs give: `reference` stands for the official one."""
    gpu_interpreter.compile_once(monkeypatch)
    inputs = attention_inputs(case, np.float16)
    with targets.use(gpu_interpreter.INTERPRETED):
        actual = attention_results(case, "mosaic_gpu", *inputs)
    with jax.enable_x64(True):
        truth = attention_results(case, "reference", *(x.astype(np.float64) for x in inputs))
    kernel_cases.assert_agree(actual, truth, np.float16)


def assert_flex_attention_tables(case, table, counts, indices, is_full):
    """Compares lists of tiles, split into partial and full ones, with the stored tables."""
    listed = np.arange(indices.shape[-1]) < counts[..., None]
    for prefix, wanted in (("", listed & ~is_full), ("full_", listed & is_full)):
        stored = f"{case['key']}_{prefix}{table}"
        stored_counts = TABLES[f"{stored}_num_blocks"]
        stored_indices = TABLES[f"{stored}_indices"]
        actual = np.broadcast_to(wanted.sum(-1), stored_counts.shape)
        np.testing.assert_array_equal(actual, stored_counts)
        slots = np.arange(stored_indices.shape[-1]) < stored_counts[..., None]
        every_head = (*stored_counts.shape, indices.shape[-1])
        chosen = np.broadcast_to(wanted, every_head)
        np.testing.assert_array_equal(
            np.broadcast_to(indices, every_head)[chosen], stored_indices[slots]
        )


@by_key(SETTINGS["block_tables"])
@pytest.mark.parametrize("table", ["kv", "q"])
def test_flex_attention_tables(case, table):
    block_mask = BlockMask.from_rule(
        strided(case),
        case["seqlen"],
        case["seqlen"],
        case["q_tile"],
        case["kv_tile"],
        is_causal=case.get("causal", True),
    )
    counts, indices, kinds = (
        getattr(block_mask, f"{table}_{name}") for name in ("counts", "indices", "kinds")
    )
    assert_flex_attention_tables(case, table, counts, indices, kinds == FULL)


@by_key(SETTINGS["block_tables"])
@pytest.mark.parametrize("table", ["kv", "q"])
def test_flex_attention_tables_in_tiles_of_kernels(case, table):
    """The lists that the kernels read, cut from a mask in the rule's own blocks."""
    tiling = Tiling.of(attention_mask(case), case["q_tile"], case["kv_tile"])
    cut = {"kv": kernel_tables.key_lists, "q": kernel_tables.query_lists}[table]
    counts, indices, bits = (x[0] for x in cut(attention_mask(case), tiling, None))
    assert_flex_attention_tables(case, table, counts, indices, bits == kernel_tables.FULL)
