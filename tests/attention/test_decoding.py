"""Every method decodes from its cache what it computes of the whole sequence."""

import importlib
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import mesh, registry
from sparseformer_jax.attention import _cache
from sparseformer_jax.model.config import ModelConfig
from tests.model.harness import normal, randomized

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
BATCH, SIZE = 3, 45  # no multiple of any block
SMALL = ModelConfig(
    vocab_size=8, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16
)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(_cache, "_CHUNK", 16)


def attentions(name):
    """One layer of each kind that the method's tiny model has."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]("tiny")
    options = registry.options("attention", config.attention)
    model = ModelConfig(**config.model)
    kinds = registry.method("attention", name).Method.layer_kinds(options, model.num_layers)
    return [
        randomized(lambda k=k, o=o: k(model, o, rngs=nnx.Rngs(0))) for k, o in dict.fromkeys(kinds)
    ]


@pytest.mark.representative("*masformer")
@pytest.mark.parametrize("name", registry.names("attention"))
def test_decoding_equals_the_whole_sequence(name):
    """In chunks of different sizes, rows at different places; what fills them up is no matter."""
    for attention in attentions(name):
        x = jnp.asarray(normal(0, BATCH, SIZE, attention.config.embed_dim))
        positions = jnp.broadcast_to(jnp.arange(SIZE), (BATCH, SIZE))
        whole = np.asarray(jax.jit(attention)(x, positions, None).output)
        decode = jax.jit(attention.decode)
        cache = attention.init_cache(BATCH, SIZE)
        start = np.asarray([7, 20, 1], np.int32)
        is_own = (np.arange(20) < start[:, None])[..., None]
        filled = np.where(is_own, x[:, :20], normal(1, *x[:, :20].shape))
        output, cache = decode(filled, np.zeros(BATCH, np.int32), cache, start)
        found = [is_own * np.asarray(output)]
        expected = [is_own * whole[:, :20]]
        for _ in range(25):
            rows = np.arange(BATCH)
            output, cache = decode(x[rows, start][:, None], start, cache)
            found.append(np.asarray(output))
            expected.append(whole[rows, start][:, None])
            start = start + 1
        # Sums of at most 45 terms in another order, twice: weights, then projections.
        found, expected = (np.concatenate(each, axis=1) for each in (found, expected))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


STRIPES = {"block_size": 2, "local_blocks": 3, "vert_stride": 5, "head_sliding_step": 1}
FORGETFUL = {  # with how many places it has for 45 tokens
    "window": ("masformer", {"span": "window", "span_size": 6}, 6),
    "block": ("masformer", {"span": "block", "span_size": 8}, 8),
    "block_and_previous": ("masformer", {"span": "block_and_previous", "span_size": 4}, 8),
    "longer_than_the_cache": ("masformer", {"span": "block", "span_size": 64}, SIZE),
    "stripes": ("s2", STRIPES, 6 + 20),
    "stripes_of_groups": ("s2", STRIPES | {"phase_by": "kv_head", "head_sliding_step": 2}, 6 + 10),
    "stripes_of_all": ("s2", STRIPES | {"homo_head": True, "head_sliding_offset": 1}, 6 + 10),
    "dense_heads": ("s2", STRIPES | {"num_dense_heads": 1}, SIZE),
}


def forgetful(case):
    name, options, _ = FORGETFUL[case]
    method = importlib.import_module(f"sparseformer_jax.attention.{name}")
    return method.Method(SMALL, method.Options(**options), rngs=nnx.Rngs(0))


@pytest.mark.representative("window", "stripes")
@pytest.mark.parametrize("case", FORGETFUL)
def test_what_is_forgotten_is_never_read_again(case):
    """Prompts longer than the cache, then several tokens at once, then one by one."""
    attention = forgetful(case)
    x = jnp.asarray(normal(0, BATCH, SIZE, SMALL.embed_dim))
    positions = jnp.broadcast_to(jnp.arange(SIZE), (BATCH, SIZE))
    whole = np.asarray(jax.jit(attention)(x, positions, None).output)
    decode = jax.jit(attention.decode)
    cache, rows = attention.init_cache(BATCH, SIZE), np.arange(BATCH)[:, None]
    assert sum(kept.shape[2] for kept in cache.values()) == 2 * FORGETFUL[case][2]
    start = np.zeros(BATCH, np.int32)
    reads = [(12, [10, 12, 1]), (12, [12, 7, 2]), *[(1, [1, 1, 1])] * 14]
    for width, lengths in reads:
        index = start[:, None] + np.arange(width)
        is_own = (np.arange(width) < np.asarray(lengths)[:, None])[..., None]
        filled = np.where(is_own, x[rows, index], 3.0)
        output, cache = decode(filled, start, cache, np.asarray(lengths))
        expected = is_own * whole[rows, index]
        # Sums of at most 45 terms in another order, twice: weights, then projections.
        np.testing.assert_allclose(is_own * output, expected, atol=1e-5 * np.abs(whole).max())
        start = start + np.asarray(lengths, np.int32)


@pytest.mark.representative("stripes")
@pytest.mark.parametrize("name", [*registry.names("attention"), "window", "stripes"])
def test_devices_share_rows_and_heads(name):
    attention = forgetful(name) if name in FORGETFUL else attentions(name)[-1]
    x = jnp.asarray(normal(1, 4, 9, attention.config.embed_dim))
    start = np.asarray([0, 3, 5, 2], np.int32)
    graphdef, state = nnx.split(attention)

    def run(state, x, start):
        """Several tokens, then one."""
        module = nnx.merge(graphdef, state)
        several, cache = module.decode(x[:, :8], start, module.init_cache(4, 16))
        one, cache = module.decode(x[:, 8:], start + 8, cache)
        return several, one, cache

    alone = jax.jit(run)(state, x, start)
    with jax.set_mesh(mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        placed = jax.device_put(x, mesh.spec("batch", "seq", None))
        together = jax.device_get(jax.jit(run)(state, placed, start))
    for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))
