"""The small modules every block is made of: projections, norms, embeddings, MLP."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from sparseformer_jax import mesh
from sparseformer_jax.model.config import ModelConfig

Axes = tuple[str | None, ...]

# MLPs with a gate, and those without.
GATED = ("swiglu", "geglu_tanh")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def in_use(variable: nnx.Variable, dtype: jnp.dtype) -> jax.Array:
    """Returns a parameter as products see it: in the compute dtype, gathered over `fsdp`."""
    return mesh.shard(variable[...].astype(dtype), *mesh.gathered_axes(variable.axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    in_dims: int = 1,
    out_sharding: PartitionSpec | None = None,
) -> Float[Array, "..."]:
    """Returns x W, over the last dimensions of x and the first of W.

    The gradient of W is the product x' dy, in this order: JAX's own is (dy' x)', for which XLA's
    CPU backend writes dy once more, transposed, and takes three times as long.
    """
    return _contract(x, kernel, range(x.ndim - in_dims, x.ndim), range(in_dims), out_sharding)


def _project_fwd(
    x: jax.Array, kernel: jax.Array, in_dims: int, out_sharding: PartitionSpec | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel, in_dims, out_sharding), (x, kernel)


def _project_bwd(
    in_dims: int,
    out_sharding: PartitionSpec | None,
    residuals: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    batch, out = range(x.ndim - in_dims), range(x.ndim - in_dims, dy.ndim)
    x_spec, kernel_spec = (
        jax.typeof(array).sharding.spec if mesh.is_active() else None for array in residuals
    )
    return (
        _contract(dy, kernel, out, range(in_dims, kernel.ndim), x_spec),
        _contract(x, dy, batch, batch, kernel_spec),
    )


project.defvjp(_project_fwd, _project_bwd)


def _contract(
    one: jax.Array,
    other: jax.Array,
    one_dims: Sequence[int],
    other_dims: Sequence[int],
    out_sharding: PartitionSpec | None,
) -> jax.Array:
    contract = (tuple(one_dims), tuple(other_dims))
    return jax.lax.dot_general(one, other, (contract, ((), ())), out_sharding=out_sharding)


class Projection(nnx.Module):
    """A linear map over the last dimensions, y = x W + b, gathered over `fsdp` when used.

    The kernel has shape [*in_shape, *out_shape] and starts as a normal of standard
    deviation init_scale / sqrt(prod(in_shape)).
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: Axes,
        config: ModelConfig,
        *,
        use_bias: bool,
        init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_dims = len(in_shape)
        self.param_dtype, self.dtype = config.dtypes
        stddev = init_scale / math.sqrt(math.prod(in_shape))
        kernel = stddev * jax.random.normal(rngs.params(), in_shape + out_shape, self.param_dtype)
        self.kernel = nnx.Param(kernel, axes=axes, in_dims=self.in_dims)
        bias_axes = axes[self.in_dims :]
        bias = jnp.zeros(out_shape, self.param_dtype)
        self.bias = nnx.Param(bias, axes=bias_axes) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns y of shape [*x.shape[:-len(in_shape)], *out_shape]."""
        return self.by(in_use(self.kernel, self.dtype), x)

    def operand(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns what the kernel multiplies of x: all, unless something comes before it."""
        return x

    def by(self, kernel: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the same with a kernel made of this one, as products see it."""
        out_axes = mesh.gathered_axes(self.kernel.axes)[self.in_dims :]
        batch_dims = x.ndim - self.in_dims
        out_sharding = None
        if mesh.is_active():
            out_sharding = mesh.spec(*("batch", "seq", None)[:batch_dims], *out_axes)
        y = project(x.astype(self.dtype), kernel, self.in_dims, out_sharding)
        return y if self.bias is None else y + in_use(self.bias, self.dtype)


class Norm(nnx.Module):
    """RMSNorm, x / rms(x) * scale, or LayerNorm, (x - mean(x)) / std(x) * scale + bias.

    Computed in float32 over the last dimension. With `norm_unit_offset` the factor is 1 + scale.
    Zhang & Sennrich 2019; Ba et al. 2016; Gemma Team 2024, as released.
    """

    def __init__(self, size: int, kind: str, config: ModelConfig) -> None:
        self.centered = kind == "layernorm"
        self.eps = config.norm_eps
        self.has_unit_offset = config.norm_unit_offset
        param_dtype, self.dtype = config.dtypes
        start = jnp.zeros if self.has_unit_offset else jnp.ones
        self.scale = nnx.Param(start(size, param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(size, param_dtype), axes=(None,)) if self.centered else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the normalised x in the compute dtype."""
        y = x.astype(jnp.float32)
        if self.centered:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        y *= 1 + scale if self.has_unit_offset else scale
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)


class Embedding(nnx.Module):
    """A table of vectors [size, D], looked up by index."""

    def __init__(self, size: int, axes: Axes, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        param_dtype, self.dtype = config.dtypes
        table = 0.02 * jax.random.normal(rngs.params(), (size, config.embed_dim), param_dtype)
        self.table = nnx.Param(table, axes=axes)

    def __call__(self, indices: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the rows of the table at the indices."""
        table = mesh.shard(self.table[...].astype(self.dtype), None, None)
        out_sharding = mesh.spec("batch", "seq", None) if mesh.is_active() else None
        return table.at[indices].get(out_sharding=out_sharding)


class Mlp(nnx.Module):
    """SwiGLU or GeGLU, (f(x W_g) * x W_u) W_d (Shazeer 2020), or gelu(x W_u) W_d."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        def up() -> Projection:
            return Projection(
                (config.embed_dim,),
                (config.mlp_dim,),
                ("embed", "mlp"),
                config,
                use_bias=config.mlp_bias,
                rngs=rngs,
            )

        self.activation = config.mlp
        self.gate = up() if config.mlp in GATED else None
        self.up = up()
        self.down = Projection(
            (config.mlp_dim,),
            (config.embed_dim,),
            ("mlp", "embed"),
            config,
            use_bias=config.mlp_bias,
            init_scale=residual_scale(config),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the MLP of every position."""
        activation = ACTIVATIONS[self.activation]
        hidden = self.up(x)
        if self.gate is None:
            return self.down(activation(hidden))
        return self.down(activation(self.gate(x)) * hidden)


def residual_scale(config: ModelConfig) -> float:
    """Returns 1/sqrt(2L), which keeps the variance of the residual stream (GPT-2)."""
    return (2 * config.num_layers) ** -0.5


def dropout(x: Float[Array, "*S"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*S"]:
    """Returns x with each entry zeroed at the rate and the rest scaled up; x without a key.

    The mask does not depend on how x is sharded.
    """
    if key is None or rate == 0.0:
        return x
    out_sharding = jax.typeof(x).sharding if mesh.is_active() else None
    kept = jax.random.uniform(key, x.shape, out_sharding=out_sharding) >= rate
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


def soft_cap(logits: Float[Array, "*S"], cap: float | None) -> Float[Array, "*S"]:
    """Returns cap * tanh(logits / cap), or the logits where no cap is set (Gemma 2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
