"""Rules over blocks for queries that lie anywhere in the sequence, as in decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.attention import _one_hot
from sparseformer_jax.attention.inputs import Shard
from tests.attention.comparison import make_attention
from tests.attention.test_masformer import span_mask
from tests.attention.test_s2 import band_and_stripes
from tests.model.harness import normal

NUM_KEYS = 29


def s2():
    attention = make_attention("s2", {"block_size": 4, "local_blocks": 1, "vert_stride": 3})
    heads = attention.config.num_heads, attention.config.num_kv_heads
    return attention, band_and_stripes(attention.options, *heads, NUM_KEYS, is_causal=True)


def masformer(span):
    attention = make_attention("masformer", {"span": span, "span_size": 7})
    return attention, span_mask(span, 7, NUM_KEYS)


CASES = {
    "s2": s2,
    **{
        span: lambda span=span: masformer(span)
        for span in ("block", "block_and_previous", "window")
    },
}


@pytest.mark.parametrize("num_queries", [1, 7, 28])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.representative("s2-28", "block-7")
def test_a_traced_offset_may_be_any(case, num_queries):
    attention, mask = CASES[case]()
    config = attention.config
    x = jnp.asarray(normal(0, 1, NUM_KEYS, config.embed_dim))
    inputs = attention._inputs(x, jnp.arange(NUM_KEYS)[None], None, None, 0)
    inputs = dataclasses.replace(inputs, weights=None, positions=None)

    @jax.jit
    def weights(offset):
        query = jax.lax.dynamic_slice_in_dim(inputs.query, offset, num_queries, axis=1)
        shard = Shard(query_offset=offset, num_heads=config.num_heads)
        own = dataclasses.replace(inputs, query=query)
        return _one_hot.weights(own, lambda x: {"": attention.attend(x, shard).output})[""][0]

    last = NUM_KEYS - num_queries
    for offset in {*np.random.default_rng(0).integers(0, last + 1, 4), last}:
        rows = np.broadcast_to(mask, (config.num_heads, *mask.shape[1:]))[:, offset:]
        np.testing.assert_array_equal(weights(offset) > 0, rows[:, :num_queries])
