"""What `scaling.py` times: attention of given shapes, and whole layers, forward and backward."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseformer_jax import registry
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig

HEAD_DIM = 64
# The layer beside the port's: 4 routed and 4 local heads, both of windows of so many tokens.
LAYER_WIDTH = 512
LAYER_WINDOW = 128
Arrays = dict[str, jax.Array]


class Pass(NamedTuple):
    """What runs forward and backward once and waits.

    Attributes:
      run: the function, which returns the results.
      mib: temporaries and results of the compiled program; None: it is not XLA's."""

    run: Callable[[], Any]
    mib: float | None = None


def missing() -> str | None:
    """Returns the first package that comparisons with PyTorch lack."""
    wanted = ("torch", "routing_transformer")
    return next((name for name in wanted if importlib.util.find_spec(name) is None), None)


def near_root(length: int) -> int:
    """Returns about sqrt(T): the nearest multiple of 8 tokens."""
    return max(8, 8 * round(length**0.5 / 8))


def data(length: int, heads: int) -> tuple[Arrays, jax.Array]:
    """Returns random query, key, value and the layer's input x, and the output's gradient."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(1, length, *shape)), jnp.float32)

    query, key, value, d_out = (normal(heads, HEAD_DIM) for _ in range(4))
    return {"query": query, "key": key, "value": value, "x": normal(heads * HEAD_DIM)}, d_out


def model(embed_dim: int, heads: int) -> ModelConfig:
    """Returns the model of one attention layer."""
    return ModelConfig(
        vocab_size=1,
        num_layers=1,
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=HEAD_DIM,
        mlp_dim=1,
    )


def compiled(function: Callable[..., Any], *arguments: Any) -> Pass:
    """Returns a run of the compiled function, and its memory."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    mib = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
    return Pass(lambda: jax.block_until_ready(program(*arguments)), mib)


def ours(method: str, length: int, heads: int, **options: Any) -> Pass:
    """Returns a method's attention as the model calls it in training.

    Gradients are of output and losses by query, key, value, the layer's input and parameters.
    """
    module = registry.method("attention", method)
    config = model(heads * HEAD_DIM, heads)
    attention = module.Method(config, module.Options(**options), rngs=nnx.Rngs(0))
    graphdef, params, variables = nnx.split(attention, nnx.Param, ...)
    tokens = (jnp.ones((1, length)),) * 2
    positions = (jnp.arange(length)[None],) * 2

    def forward(params: Any, arrays: Arrays, variables: Any) -> Any:
        query, key, value, x = (arrays[name] for name in ("query", "key", "value", "x"))
        on_demand = {"x": x, "unrotated_query": query, "unrotated_key": key}
        inputs = Inputs(query, key, value, weights=tokens, positions=positions, **on_demand)
        attended = nnx.merge(graphdef, params, variables).attend(inputs, Shard(num_heads=heads))
        loss = sum(map(jnp.sum, attended.losses.values()), jnp.zeros(()))
        return (attended.output, loss), attended.statistics

    def both(params: Any, arrays: Arrays, variables: Any, d_out: jax.Array) -> Any:
        forward_ = functools.partial(forward, variables=variables)
        (output, loss), pull, statistics = jax.vjp(forward_, params, arrays, has_aux=True)
        of_params, of_arrays = pull((d_out, jnp.ones_like(loss)))
        return output, of_arrays, of_params, statistics

    arrays, d_out = data(length, heads)
    return compiled(both, params, arrays, variables, d_out)


def routing(length: int, heads: int, *, selection: str) -> Pass:
    """Returns the Routing Transformer: all heads routed, T / w clusters, w about sqrt(T)."""
    window = near_root(length)
    options = {"num_routed_heads": heads, "window_size": window, "num_clusters": length // window}
    return ours("routing", length, heads, selection=selection, **options)


def combiner(length: int, heads: int, *, variant: str) -> Pass:
    """Returns Combiner with spans of about sqrt(T) tokens."""
    return ours("combiner", length, heads, variant=variant, span_size=near_root(length))


def dense(length: int, heads: int) -> Pass:
    """Returns our kernel over the whole causal triangle."""
    return ours("dense", length, heads)


def jax_nn(length: int, heads: int) -> Pass:
    """Returns JAX's attention."""
    arrays, d_out = data(length, heads)
    del arrays["x"]

    def both(arrays: Arrays, d_out: jax.Array) -> Any:
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        output, pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
        return output, *pull(d_out)

    return compiled(both, arrays, d_out)


def torch_attention(length: int, heads: int) -> Pass:
    """Returns PyTorch's attention."""
    import torch

    torch.set_num_threads(_num_threads())
    arrays, d_out = data(length, heads)
    *inputs, d_out = (
        torch.tensor(np.asarray(x)).transpose(1, 2).contiguous()
        for x in (arrays["query"], arrays["key"], arrays["value"], d_out)
    )
    inputs = [x.requires_grad_() for x in inputs]

    def run() -> Any:
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        return output, torch.autograd.grad(output, inputs, d_out)

    return Pass(run)


def port_layer(length: int) -> Pass:
    """Returns the port's layer: output, commitment loss, gradients, and means moved."""
    import torch
    from routing_transformer.routing_transformer import SelfAttention

    torch.set_num_threads(_num_threads())
    torch.manual_seed(0)
    layer = SelfAttention(
        dim=LAYER_WIDTH,
        depth=1,
        max_seq_len=length,
        heads=8,
        local_attn_heads=4,
        window_size=LAYER_WINDOW,
        causal=True,
        shared_qk=True,
    )
    x = torch.randn(1, length, LAYER_WIDTH, requires_grad=True)
    d_out = torch.randn(1, length, LAYER_WIDTH)

    def run() -> Any:
        layer.zero_grad()
        x.grad = None
        output, loss = layer(x)
        torch.autograd.backward([output, loss], [d_out, torch.ones_like(loss)])
        layer.global_attn.kmeans.update()
        return output, x.grad

    return Pass(run)


def our_layer(length: int, *, selection: str) -> Pass:
    """Returns our layer of the same shapes, with the same results."""
    module = registry.method("attention", "routing")
    options = module.Options(
        num_routed_heads=4,
        num_clusters=length // LAYER_WINDOW,
        window_size=LAYER_WINDOW,
        block_size=LAYER_WINDOW,
        selection=selection,
    )
    layer = module.Method(model(LAYER_WIDTH, 8), options, rngs=nnx.Rngs(0))
    graphdef, params, variables = nnx.split(layer, nnx.Param, ...)
    x, d_out = jax.random.normal(jax.random.key(0), (2, 1, length, LAYER_WIDTH))
    positions = jnp.arange(length)[None]

    def both(params: Any, x: jax.Array, variables: Any, d_out: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            layer = nnx.merge(graphdef, params, variables)
            attended = layer(x, positions, None, rng=jax.random.key(0))
            return (attended.output, attended.losses["commitment"]), attended.statistics

        (output, loss), pull, statistics = jax.vjp(forward, params, x, has_aux=True)
        names = nnx.to_pure_dict(variables)
        moved = module.Method.update(options, names, statistics)
        of_params, of_x = pull((d_out, jnp.ones_like(loss)))
        return output, of_x, of_params, moved

    return compiled(both, params, x, variables, d_out)


def _num_threads() -> int:
    """As many threads as XLA takes: a core each."""
    return len(os.sched_getaffinity(0))


# By name: what makes the pass of a length and a number of heads.
ATTENTION: dict[str, Callable[[int, int], Pass]] = {
    "routing": functools.partial(routing, selection="causal"),
    "routing, paper": functools.partial(routing, selection="paper"),
    "combiner, fixed": functools.partial(combiner, variant="fixed"),
    "combiner, axial_row": functools.partial(combiner, variant="axial_row"),
    "combiner, axial_mixture": functools.partial(combiner, variant="axial_mixture"),
    "combiner, log_sparse": functools.partial(combiner, variant="log_sparse"),
    "dense": dense,
    "jax.nn": jax_nn,
    "torch": torch_attention,
}
DENSE = ("dense", "jax.nn", "torch")

# The first is what the others are compared with.
LAYER: dict[str, Callable[[int], Pass]] = {
    "port": port_layer,
    "ours": functools.partial(our_layer, selection="causal"),
    "ours, paper": functools.partial(our_layer, selection="paper"),
}
