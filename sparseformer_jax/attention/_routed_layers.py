"""The layers that routed heads add to those of `Attention`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparseformer_jax import mesh
from sparseformer_jax.attention import _tiles
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.layers import Projection, in_use, residual_scale


class SharedOutput(Projection):
    """The output projection behind one matrix [H, H] for all heads, at first the identity."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(
            (config.num_heads, config.head_dim),
            (config.embed_dim,),
            ("heads", "head_dim", "embed"),
            config,
            use_bias=config.out_bias,
            init_scale=residual_scale(config),
            rngs=rngs,
        )
        shared = jnp.eye(config.head_dim, dtype=self.param_dtype)
        self.shared = nnx.Param(shared, axes=(None, "head_dim"), in_dims=1)

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Returns the heads' outputs, each times the shared matrix, projected together.

        The matrix is multiplied with what has fewer rows, tokens or the kernel.
        """
        shared = in_use(self.shared, self.dtype)
        kernel = in_use(self.kernel, self.dtype)
        if x.shape[0] * x.shape[1] < kernel.shape[-1]:
            return self.by(kernel, self.operand(x))
        return self.by(jnp.einsum("hk,nkd->nhd", shared, kernel), x)

    def operand(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Returns the heads' outputs, each times the shared matrix."""
        return jnp.einsum("btnh,hk->btnk", x.astype(self.dtype), in_use(self.shared, self.dtype))


class LocalQueries(Projection):
    """The query projection of some heads; the others share the key's."""

    def __init__(self, num_heads: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(
            (config.embed_dim,),
            (num_heads, config.head_dim),
            ("embed", "heads", "head_dim"),
            config,
            use_bias=config.qkv_bias,
            rngs=rngs,
        )


class NoQueries(nnx.Module):
    """The queries of no heads at all, for which there is nothing to learn."""

    def __init__(self, config: ModelConfig) -> None:
        self.head_dim = config.head_dim
        _, self.dtype = config.dtypes

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T 0 H"]:
        """Returns an empty array for x."""
        empty = jnp.zeros((*x.shape[:-1], 0, self.head_dim), self.dtype)
        return mesh.shard(empty, "batch", "seq", "heads", None)


class Relative(nnx.Module):
    """Embeddings of differences from -m to m, added to keys and to values (Shaw et al. 2018)."""

    def __init__(self, most: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        param_dtype, _ = config.dtypes
        shape = (2 * most + 1, config.head_dim)

        def table() -> nnx.Param:
            noise = config.head_dim**-0.5 * jax.random.normal(rngs.params(), shape, param_dtype)
            return nnx.Param(noise, axes=(None, "head_dim"))

        self.key, self.value = table(), table()

    def __call__(self) -> _tiles.Relative:
        """Returns the tables."""
        return _tiles.Relative(self.key[...], self.value[...])
