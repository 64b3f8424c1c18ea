"""Calls of attention that cannot be meant: one line each, that names the argument."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, autotune, block_sparse_attention, explain


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def windowed(*shape):
    return BlockMask.from_block_map(
        np.ones(shape, bool), 16, 16, 8, 8, is_causal=True, window_size=4
    )


ALL = ("query", "key", "value")
IDS = zeros(1, 16, dtype=jnp.int32)
BAD_CALLS = {
    "query has shape \\(16, 2, 8\\): pass \\[batch, length": {"query": zeros(16, 2, 8)},
    "query has shape .* none of them 0": dict.fromkeys(ALL, zeros(0, 16, 2, 8)),
    "query has shape \\(1, 0, 2, 8\\)": {"query": zeros(1, 0, 2, 8)},
    "key has shape \\(1, 16, 0, 8\\)": dict.fromkeys(("key", "value"), zeros(1, 16, 0, 8)),
    "query is NoneType: pass an array": {"query": None},
    "value is list: pass an array": {"value": [1.0]},
    "query is int32.*one floating dtype": dict.fromkeys(ALL, zeros(1, 16, 2, 8, dtype=jnp.int32)),
    "float8_e4m3fn.* of 16 bits or more": dict.fromkeys(
        ALL, zeros(1, 16, 2, 8, dtype=jnp.float8_e4m3fn)
    ),
    "key is bfloat16, query float32: cast": {"key": zeros(1, 16, 2, 8, dtype=jnp.bfloat16)},
    "value has shape": {"value": zeros(1, 15, 2, 8)},
    "key has shape \\(2, .* equal batch": dict.fromkeys(("key", "value"), zeros(2, 16, 2, 8)),
    "key heads that divide": {"query": zeros(1, 16, 3, 8)},
    "block_mask was built for 16 queries": {"query": zeros(1, 9, 2, 8)},
    "block_mask has 3 pattern heads": {"block_mask": windowed(3, 2, 2)},
    "block_mask has batch 5": {"block_mask": windowed(5, 2, 2, 2)},
    "block_mask is ndarray: pass a BlockMask": {"block_mask": np.ones((1, 2, 2))},
    "block_mask is NoneType: pass": {"block_mask": None},
    "segment_ids are \\(int32\\[1, 9\\]": {"segment_ids": (zeros(1, 9, dtype=jnp.int32),) * 2},
    "segment_ids are \\(float32": {"segment_ids": (zeros(1, 16),) * 2},
    "segment_ids are int32\\[1, 16\\]: pass": {"segment_ids": IDS},
    "segment_ids are \\(int32\\[1, 16\\]\\)": {"segment_ids": (IDS,)},
    "segment_ids are \\(int32\\[1, 16\\], None\\)": {"segment_ids": (IDS, None)},
    "segment_ids are .*: pass integers": {"segment_ids": 3},
    "is_causal=False, but block_mask was built": {"is_causal": False},
    "is_causal=None must be True or False": {"is_causal": None},
    "window_size=None is wider than the 4": {"window_size": None},
    "window_size=-1 must be at least 1": {"window_size": -1},
    "window_size=3.5 must be an integer": {"window_size": 3.5},
    "window_size=True must be an integer": {"window_size": True},
    "query_offset is 1.5: pass one integer": {"query_offset": 1.5},
    "query_offset is 'first': pass one": {"query_offset": "first"},
    "query_offset=1073741824 must be from": {"query_offset": 2**30},
    "logits_soft_cap=0.0 must be positive": {"logits_soft_cap": 0.0},
    "logits_soft_cap=nan must be positive": {"logits_soft_cap": float("nan")},
    "logits_soft_cap=inf must be .* finite": {"logits_soft_cap": float("inf")},
    "logits_soft_cap='1' must be positive": {"logits_soft_cap": "1"},
    "scale=nan must be a finite": {"scale": float("nan")},
    "scale='1' must be a finite": {"scale": "1"},
    "scale=float32\\[\\] must be a finite Python": {"scale": jnp.float32(1)},
    "implementation='cuda' must name one": {"implementation": "cuda"},
    "implementation=\\(\\) must name one": {"implementation": ()},
    "implementation=\\('xla', 'cuda'\\) must": {"implementation": ("xla", "cuda")},
    "implementation=3 must name one": {"implementation": 3},
    "implementation={'xla'} must name one": {"implementation": {"xla"}},
}


@pytest.mark.parametrize(("message", "change"), BAD_CALLS.items(), ids=BAD_CALLS)
def test_bad_input(message, change, untyped):
    array = zeros(1, 16, 2, 8)
    arguments = {
        "query": array,
        "key": array,
        "value": array,
        "block_mask": windowed(1, 2, 2),
        "is_causal": True,
        "window_size": 4,
    } | change
    inputs = [arguments.pop(name) for name in (*ALL, "block_mask")]
    for function in (block_sparse_attention, explain, autotune):
        with pytest.raises(ValueError, match=message) as error:
            function(*inputs, **arguments)
        assert "\n" not in str(error.value)
