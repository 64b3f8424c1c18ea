"""Combiner against vectors of the authors' released JAX and TensorFlow code.

Everything comes from the files: other shapes, seeds and settings pass unchanged.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparseformer_jax.attention import combiner
from sparseformer_jax.model.config import ModelConfig
from tests.golden import loading
from tests.model.harness import assert_close, pure

MANIFEST = loading.settings("combiner", "manifest.json")
VARIANTS = {
    "fixed": "fixed",
    "log-sparse": "log_sparse",
    "axial row-major": "axial_row",
    "axial mixture": "axial_mixture",
}
POOLS = {"identity-max": "max", "deepset-max": "deepsets"}
NAMES = {
    "w_q": "query/kernel",
    "w_k": "key/kernel",
    "w_v": "value/kernel",
    "w_o": "out/kernel",
    "b_q": "query/bias",
    "b_k": "key/bias",
    "b_v": "value/bias",
    "b_o": "out/bias",
    "w_pool_q": "pool_query/kernel",
    "w_pool_k": "pool_key/kernel",
    "w_rowproj": "row/kernel",
    "b_rowproj": "row_bias",
    "ln_scale": "row_norm/scale",
    "ln_bias": "row_norm/bias",
    "w_rowkey": "row_key/kernel",
    "b_rowkey": "row_key/bias",
}
# Of the largest entry: sums of tens of float32 terms, through a softmax or two.
OUTPUT, GRADIENT = 1e-5, 5e-5


def make_attention(settings, arrays):
    """The released layer with its weights."""
    options = combiner.Options(
        variant=VARIANTS[settings["kind"]],
        span_size=settings["span"] or 1,
        pool=POOLS[settings.get("pool", "identity-max")],
        mixture_pool=settings.get("span_pool", "max"),
        count_own_span=not settings["causal"],
        mask_empty=settings["causal"] or settings["kind"] != "axial mixture",
    )
    heads = settings["H"]
    config = ModelConfig(
        vocab_size=2,
        num_layers=1,
        embed_dim=settings["D"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=arrays["w_q"].shape[-1],
        mlp_dim=1,
        is_causal=settings["causal"],
        position="none",
        norm_eps=settings.get("ln_eps", 1e-6),
        qkv_bias="b_q" in arrays,
        out_bias="b_o" in arrays,
    )
    attention = combiner.Method(config, options, rngs=nnx.Rngs(0))
    weights = {tuple(NAMES[name].split("/")): arrays[name] for name in arrays.keys() & NAMES.keys()}
    assert weights.keys() == dict(nnx.to_flat_state(nnx.state(attention))).keys()
    nnx.update(attention, nnx.from_flat_state(list(weights.items())))
    return attention


@pytest.mark.parametrize("file", MANIFEST)
def test_outputs_weights_and_gradients(file):
    settings, arrays = MANIFEST[file]["settings"], loading.arrays("combiner", file)
    assert {name: list(x.shape) for name, x in arrays.items()} == {
        name: shape for name, (shape, _) in MANIFEST[file]["arrays"].items()
    }
    attention = make_attention(settings, arrays)
    graphdef = nnx.graphdef(attention)
    positions = jnp.broadcast_to(jnp.arange(settings["n"]), (settings["B"], settings["n"]))

    @jax.jit
    def run(parameters, x):
        def loss(parameters, x):
            module = nnx.merge(graphdef, parameters)
            output = module(x, positions, None).output
            return jnp.vdot(arrays["cotangent"], output), output

        return jax.grad(loss, (0, 1), has_aux=True)(parameters, x)

    (gradients, grad_x), output = run(pure(attention), arrays["x"])
    gradients = nnx.to_flat_state(nnx.state(nnx.merge(graphdef, gradients)))
    found = {"/".join(path): variable[...] for path, variable in gradients} | {"x": grad_x}
    found = {name: found[path] for name, path in (NAMES | {"x": "x"}).items() if path in found}
    assert_close(output, arrays["out"], OUTPUT)
    assert_close(found, {name: arrays[f"grad_{name}"] for name in found}, GRADIENT)
    if "eff_attn" in arrays:
        weights = jax.jit(lambda p, x: nnx.merge(graphdef, p).effective_attention(x))(
            pure(attention), arrays["x"][:1]
        )
        assert_close(weights[0], arrays["eff_attn"], OUTPUT)
