"""Kinds of gates at sizes for tests, and what they are given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.attention._block_selection import choose
from sparseformer_jax.attention.inputs import Noise, Shard
from tests.attention.comparison import make_attention
from tests.model.harness import normal

SIZE = 8
GATES = {
    "prefill": {"gates": "prefill", "block_size": SIZE},
    "double": {
        "gates": "prefill",
        "block_size": SIZE,
        "gate_dim": 4,
        "query_projection": "head",
        "query_pools": ("max", "avg"),
    },
    "decode": {"gates": "decode", "block_size": SIZE},
    "group": {
        "gates": "decode",
        "block_size": SIZE,
        "query_projection": "group",
        "gate_norm": True,
    },
}
kinds = pytest.mark.parametrize("kind", GATES)


def make(kind, **options):
    return make_attention("seer", GATES[kind] | options)


def inputs_of(attention, x, positions=None, ids=None, noise=None):
    if positions is None:
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    ids = None if ids is None else jnp.asarray(ids)
    inputs = _projected(attention, jnp.asarray(x), jnp.asarray(positions), ids)
    return dataclasses.replace(inputs, noise=noise)


@jax.jit
def _projected(attention, x, positions, ids):
    return attention._inputs(x, positions, ids, None, 0)


@jax.jit
def attend(attention, inputs):
    return attention.attend(inputs, Shard(num_heads=attention.config.num_heads))


@jax.jit
def choice(attention, inputs):
    """Scores of blocks, which of them are chosen, and in which rows more would be."""
    scored = attention._scored(inputs, Shard(num_heads=attention.config.num_heads))
    return scored.scores, *choose(attention.options, scored)


def losses(attention, *arrays):
    """Of each token."""
    inputs = inputs_of(attention, *arrays, noise=Noise(jax.random.key(0)))
    return np.asarray(attend(attention, inputs).losses["gate"])


def states(attention, seed, batch, length):
    return jnp.asarray(3 * normal(seed, batch, length, attention.config.embed_dim))


def token_mask(kind, chosen, length):
    """Which keys each query of four heads sees [B, 4, T, T], of a map of blocks."""
    chosen, num_heads = np.asarray(chosen), 4
    row = np.arange(length) // (SIZE if kind in ("prefill", "double") else 1)
    heads = np.arange(num_heads) * chosen.shape[1] // num_heads
    mask = chosen[:, heads][:, :, row][..., np.arange(length) // SIZE]
    return mask & np.tri(length, dtype=bool)
