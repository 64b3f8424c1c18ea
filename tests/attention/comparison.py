"""Compares an attention method with softmax under a token mask written out naively."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sparseformer_jax import mesh, registry
from tests.model import reference
from tests.model.harness import (
    assert_close,
    in_float64,
    normal,
    packed,
    place,
    pure,
    put,
    randomized,
    small_config,
)


def make_attention(name, options, **model):
    """One module of a method, with noise on all its parameters."""
    options = registry.options("attention", ConfigDict({"name": name, **options}))
    method = registry.method("attention", name).Method
    config = small_config(**model)
    return randomized(lambda: method(config, options, rngs=nnx.Rngs(0)))


def assert_masked_softmax(attention, mask):
    """Output and all gradients are those of softmax over `mask`, [N, T, T], in float64."""
    config, num_tokens = attention.config, mask.shape[-1]
    segment_ids, positions = packed(np.random.default_rng(0), 2, num_tokens)
    x = normal(1, 2, num_tokens, config.embed_dim)
    weights = normal(2, *x.shape)
    graphdef = nnx.graphdef(attention)

    def actual(parameters, x):
        module = nnx.merge(graphdef, parameters)
        output = module(x, jnp.asarray(positions), jnp.asarray(segment_ids)).output
        return jnp.vdot(weights, output), output

    def expected(parameters, x):
        visible = mask & reference.same_segment(segment_ids)
        output = reference.attention(parameters, x, positions, visible, config)
        return jnp.vdot(weights, output), output

    results = jax.jit(jax.grad(actual, (0, 1), has_aux=True))(pure(attention), x)
    truth = in_float64(jax.grad(expected, (0, 1), has_aux=True), pure(attention), x)
    assert_close(results, truth, 1e-5)


def assert_same_on_mesh(attention, sizes, num_tokens, rng=None):
    """Output, losses and diagnostics on a mesh of eight devices are those of one."""
    x = normal(0, 8, num_tokens, attention.config.embed_dim)
    segment_ids, positions = packed(np.random.default_rng(0), 8, num_tokens)
    run = jax.jit(lambda module, *arguments: module(*arguments, rng=rng))
    expected = run(attention, x, positions, segment_ids)
    with jax.set_mesh(mesh.make_mesh(sizes)):
        ids = (put(ids, "batch", "seq") for ids in (positions, segment_ids))
        actual = run(place(attention), put(x, "batch", "seq", None), *ids)
    assert_close(actual, expected, 1e-5)
