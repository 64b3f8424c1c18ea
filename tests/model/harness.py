"""What the tests of models share: making, perturbing, sharding and comparing them."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseformer_jax import mesh
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig

# Four query heads in two groups; every size differs.
SMALL = {
    "vocab_size": 37,
    "num_layers": 3,
    "embed_dim": 20,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_dim": 28,
}

# The source of a method for `add_attention`, whose reports depend on the tokens.
PENALISED = '''
"""Dense attention that is asked for little output."""

import jax.numpy as jnp

from sparseformer_jax.attention import dense
from sparseformer_jax.attention.base import AttentionOutput
from sparseformer_jax.attention.dense import Options as Options


class Method(dense.Method):
    def attend(self, *arguments):
        output = super().attend(*arguments).output
        losses = {"energy": 20 * jnp.mean(jnp.square(output), axis=(2, 3))}
        return AttentionOutput(output, losses, {"density": jnp.mean(jnp.abs(output))})
'''


def small_config(**changes):
    return ModelConfig(**SMALL | changes)


def random_parameter(name, shape):
    """Noise by the parameter's name; around one for the scales of norms."""
    noise = normal(zlib.crc32(name.encode()), *shape) / 5
    return jnp.asarray(noise + name.endswith("scale"))


def randomized(make):
    """The module that `make` makes with noise for parameters: nothing is zero."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = [
        (path, random_parameter("/".join(map(str, path)), leaf.shape))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def pure(module):
    """The module's parameters as nested dictionaries of arrays."""
    return nnx.to_pure_dict(nnx.state(module))


def layers(model):
    """The blocks of a transformer, one after another, unstacked."""
    for stack in model.stacks:
        yield from stack.blocks()


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(rng, batch, num_tokens, documents=3):
    """Random documents in every row: (segment ids, positions that restart)."""
    ends = np.sort(rng.integers(0, num_tokens, (batch, documents - 1)), axis=1)
    tokens = np.arange(num_tokens)
    segment_ids = (tokens[None, :, None] >= ends[:, None, :]).sum(-1)
    starts = np.concatenate([np.zeros((batch, 1), int), ends], axis=1)
    positions = tokens - np.take_along_axis(starts, segment_ids, axis=1)
    return segment_ids.astype(np.int32), positions.astype(np.int32)


def assert_close(actual, expected, tolerance):
    """Compares trees, each array relative to its own maximum.

    An array that is zero but for rounding is compared at a tenth of the largest.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))

    def check(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.abs(y).max(), largest / 10)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=where)

    jax.tree_util.tree_map_with_path(check, actual, expected)


def in_float64(function, *arguments):
    """Runs the function on the arguments as float64."""

    def double(x):
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return np.asarray(x, np.float64) if floating else x

    with jax.enable_x64(True):
        return jax.device_get(jax.jit(function)(*jax.tree.map(double, arguments)))


def place(module):
    """The module with its parameters divided over the current mesh, where trainers do."""
    device_mesh = jax.sharding.get_mesh()

    def put(variable):
        axes = variable.get_metadata("axes")
        spec = mesh.spec(*(None,) * (variable.ndim - len(axes)), *axes)
        return jax.device_put(variable[...], jax.NamedSharding(device_mesh, spec))

    graphdef, state = nnx.split(module)
    placed = jax.tree.map(put, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(graphdef, placed)


def put(x, *axes):
    """The array divided over the current mesh by the logical names of its dimensions."""
    return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec(*axes)))


def attention_weights(attention, query, key, segment_ids=None):
    """What every query gives every key, [B, N, T, S]."""
    ids = None if segment_ids is None else (segment_ids,) * 2
    weights = jnp.ones(query.shape[:2]), jnp.ones(key.shape[:2])
    return weights_of(attention, Inputs(query, key, key, segment_ids=ids, weights=weights))


def weights_of(attention, inputs):
    """The same of any inputs, by the output for one-hot values."""
    batch, num_keys, kv_heads, head_dim = inputs.key.shape
    chunks = -(-num_keys // head_dim)
    one_hot = np.eye(num_keys, chunks * head_dim, dtype=inputs.key.dtype)
    one_hot = one_hot.reshape(num_keys, chunks, 1, 1, head_dim).transpose(1, 2, 0, 3, 4)
    value = jnp.broadcast_to(one_hot, (chunks, *inputs.key.shape))

    def repeat(x):
        return jnp.concatenate([x] * chunks) if jnp.ndim(x) else x

    inputs = jax.tree.map(repeat, inputs)
    inputs = dataclasses.replace(inputs, value=value.reshape(inputs.key.shape))
    attended = attention.attend(inputs, Shard(num_heads=inputs.query.shape[2])).output
    weights = jnp.moveaxis(attended.reshape(chunks, batch, *attended.shape[1:]), 0, -2)
    return weights.reshape(*weights.shape[:-2], -1)[..., :num_keys].swapaxes(1, 2)
