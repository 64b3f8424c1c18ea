"""What a method is handed over, and noise that no mesh changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import mesh
from sparseformer_jax.attention import dense
from sparseformer_jax.attention.base import AttentionOutput
from sparseformer_jax.attention.inputs import Noise
from tests.model.harness import (
    assert_close,
    normal,
    packed,
    place,
    put,
    randomized,
    small_config,
)

MESHES = [
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"tensor": 2, "context": 4},
]


class Noisy(dense.Method):
    """Drops outputs, adds noise to heads of keys and to blocks of four queries."""

    def attend(self, inputs, shard):
        attended = super().attend(inputs, shard)
        noise, output = inputs.noise, attended.output
        kept = noise.draw(jax.random.uniform, output.shape, ("batch", "seq", "heads", None)) > 0.3
        blocks = noise.draw(
            jax.random.normal,
            (output.shape[0], output.shape[1] // 4, inputs.key.shape[2]),
            ("batch", "seq", "kv_heads"),
        )
        groups = output.shape[2] // inputs.key.shape[2]
        blocks = jnp.repeat(jnp.repeat(blocks, 4, axis=1), groups, axis=2)
        return AttentionOutput(jnp.where(kept, output, 0) + blocks[..., None])


class Curious(dense.Method):
    """Returns what it asked for, in place of attention."""

    needs = frozenset({"x", "unrotated_query", "unrotated_key"})

    def attend(self, inputs, shard):
        local, whole = inputs.positions
        own = jax.lax.dynamic_slice_in_dim(whole, shard.query_offset, local.shape[1], 1)
        near = jax.lax.dynamic_slice_in_dim(
            inputs.unrotated_key, shard.query_offset, local.shape[1], 1
        )
        groups = inputs.query.shape[2] // near.shape[2]
        output = inputs.unrotated_query + jnp.repeat(near, groups, axis=2)
        output += jnp.sum(inputs.x, axis=-1)[..., None, None] + inputs.step
        return AttentionOutput(output + (own - local)[..., None, None])


def outputs(method, sizes):
    """The module's output in training, on one device and on a mesh."""
    config = small_config(embed_dim=16)
    attention = randomized(lambda: method(config, dense.Options(), rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(0, 8, 32, 16))
    segment_ids, positions = packed(np.random.default_rng(0), 8, 32)

    @jax.jit
    def run(module, x, positions, segment_ids):
        key = jax.random.key(0)
        return module(x, positions, segment_ids, step=jnp.asarray(3), rng=key).output

    expected = run(attention, x, positions, segment_ids)
    with jax.set_mesh(mesh.make_mesh(sizes)):
        ids = (put(ids, "batch", "seq") for ids in (positions, segment_ids))
        return attention, x, expected, run(place(attention), put(x, "batch", "seq", None), *ids)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.representative("{'tensor': 2, 'context': 4}", "{'data': 2, 'fsdp': 2, 'context': 2}")
def test_noise_does_not_depend_on_the_mesh(sizes):
    _, _, expected, actual = outputs(Noisy, sizes)
    assert_close(actual, expected, 1e-5)


def test_what_is_asked_for_comes_whole():
    attention, x, expected, actual = outputs(Curious, {"fsdp": 2, "tensor": 2, "context": 2})
    assert_close(actual, expected, 1e-5)
    key = jnp.repeat(attention.key(x), 2, axis=2)
    own = attention.query(x) + key + jnp.sum(x, -1)[..., None, None] + 3
    assert_close(expected, attention.out(own), 1e-5)


def test_what_is_not_asked_for_is_not_made():
    class Plain(dense.Method):
        def attend(self, inputs, shard):
            assert inputs.x is inputs.unrotated_query is inputs.unrotated_key is None
            assert inputs.noise is None
            return super().attend(inputs, shard)

    attention = Plain(small_config(), dense.Options(), rngs=nnx.Rngs(0))
    attention(jnp.zeros((1, 4, 20)), jnp.zeros((1, 4), jnp.int32), None)


def test_a_method_that_needs_what_there_is_not_is_refused():
    class Wrong(dense.Method):
        needs = frozenset({"y"})

    with pytest.raises(ValueError, match=r"Wrong\.needs=\['y'\]: take from \['unrotated_key', "):
        Wrong(small_config(), dense.Options(), rngs=nnx.Rngs(0))


def test_draws_differ_along_every_axis_and_follow_their_sampler():
    noise = Noise(jax.random.key(1))
    drawn = noise.draw(jax.random.normal, (8, 3, 16, 32), (None, "heads", "seq", "batch"))
    assert drawn.shape == (8, 3, 16, 32)
    assert len(np.unique(drawn)) > 0.999 * drawn.size
    assert abs(float(drawn.mean())) < 0.03
    assert abs(float(drawn.std()) - 1) < 0.03
    part = Noise(jax.random.key(1), {"heads": 0, "seq": 1, "batch": 3})
    part = part.draw(jax.random.normal, (8, 3, 8, 8), (None, "heads", "seq", "batch"))
    np.testing.assert_array_equal(part, drawn[:, :, 8:, 24:])
    for axes in (("batch",), ("batch", "embed")):
        with pytest.raises(ValueError, match="take one of"):
            noise.draw(jax.random.normal, (2, 2), axes)


@pytest.mark.parametrize("softmax_dtype", ["bfloat16", "float16"])
def test_attention_weights_are_float32_whatever_softmax_dtype(softmax_dtype):
    """It is of the output logits; kernels accumulate in float32."""
    x, positions = jnp.asarray(normal(0, 1, 16, 20)), jnp.arange(16)[None]

    def run(dtype):
        config = small_config(softmax_dtype=dtype)
        return dense.Method(config, dense.Options(), rngs=nnx.Rngs(0))(x, positions, None).output

    np.testing.assert_array_equal(run(softmax_dtype), run("float32"))
