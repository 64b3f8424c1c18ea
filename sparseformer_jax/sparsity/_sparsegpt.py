"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): prunes input by input.

Of H = 2 x x' with damping on its diagonal, H^-1 = U'U with U upper triangular. A weight of input j
scores w^2 / U_jj^2. As those that are dropped become zero, the later weights of their outputs
change by - (w_j / U_jj) U_j: , which makes up for them best. So a mask is chosen from the weights
as they are when its group of inputs is reached: m of them or, of a kept fraction, a block.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparseformer_jax.sparsity import _selection, nm
from sparseformer_jax.sparsity._selection import AnyPattern

_product = functools.partial(jnp.matmul, precision="highest")


def sparsegpt(
    weight: Float[Array, "I O"],
    hessian: Float[Array, "I I"],
    pattern: AnyPattern,
    *,
    update_weights: bool,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[Float[Array, "I O"], Bool[Array, "I O"], Float[Array, "I O"]]:
    """Returns the weights, which are kept, and their scores, each as it was when it counted.

    With an update those dropped are zero; so are all of an input that is always zero. Where H has
    no inverse, scores and updated weights are not numbers.

    Args:
      weight: W.
      hessian: 2 x x', to any scale.
      pattern: n:m, or a kept fraction, of which each block drops one more than the share.
      update_weights: whether kept weights make up for the dropped ones; else W is returned.
      block_size: inputs of which later ones learn together, made a multiple of m; of a kept
        fraction those that are compared.
      damping: added to the diagonal of H, relative to its mean.

    Raises:
      ConfigError: the inputs do not divide into groups.
    """
    num_inputs, num_outputs = weight.shape
    group = block_size
    if isinstance(pattern, nm.Pattern):
        group = pattern.m
        nm.groups(weight, group, axis=-2)  # refuses what does not divide
    block = max(block_size - block_size % group, group)
    num_blocks = -(-num_inputs // block)
    fill = num_blocks * block - num_inputs
    factor = jax.scipy.linalg.block_diag(inverse_factor(hessian, damping), jnp.eye(fill))
    live = jnp.where(jnp.diagonal(hessian)[:, None] == 0, 0, weight.astype(jnp.float32))
    current = jnp.pad(live, ((0, fill), (0, 0)))
    choices = _chooser(pattern, (num_inputs, num_outputs), block)

    def body(number: Int[Array, ""], carry: _Rows) -> _Rows:
        start = number * block
        rows = jax.lax.dynamic_slice_in_dim(factor, start, block)
        own = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        before = _Rows(*(jax.lax.dynamic_slice_in_dim(x, start, block) for x in carry))
        choose = functools.partial(choices, number)
        pruned, errors = _prune_block(before, own, choose, group, update_weights=update_weights)
        # U is zero for the inputs before, and those of the block are written over.
        later = carry.weight - _product(rows.T, errors)
        return _Rows(
            *map(functools.partial(_put, start=start), carry._replace(weight=later), pruned)
        )

    start = _Rows(current, jnp.ones_like(current, bool), jnp.zeros_like(current))
    found = jax.lax.fori_loop(0, num_blocks, body, start)
    updated, mask, scores = (x[:num_inputs] for x in found)
    return (updated.astype(weight.dtype) if update_weights else weight), mask, scores


class _Rows(NamedTuple):
    """Weights of some inputs as they are, which are kept, and the scores they had."""

    weight: Float[Array, "P O"]
    mask: Bool[Array, "P O"]
    scores: Float[Array, "P O"]


def _put(
    whole: Shaped[Array, "P O"], part: Shaped[Array, "Q O"], start: Int[Array, ""]
) -> Shaped[Array, "P O"]:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)


def inverse_factor(hessian: Float[Array, "I I"], damping: float) -> Float[Array, "I I"]:
    """Returns U, upper triangular with H^-1 = U'U; not a number where H is not definite.

    H = RR' with R upper triangular is Cholesky's L with rows and columns reversed, and U = R^-1:
    H^-1 itself, of its condition, is never formed.
    """
    diagonal = jnp.diagonal(hessian)
    diagonal = jnp.where(diagonal == 0, 1, diagonal)
    diagonal = diagonal + damping * jnp.mean(diagonal)
    damped = jnp.fill_diagonal(hessian, diagonal, inplace=False)
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    identity = jnp.eye(len(hessian), dtype=hessian.dtype)
    inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    return inverse[::-1, ::-1]


def _chooser(
    pattern: AnyPattern, shape: tuple[int, int], block: int
) -> Callable[[Int[Array, ""], Float[Array, "G O"]], Bool[Array, "G O"]]:
    """Which entries of a group in a block of some number are kept, by their scores."""
    if isinstance(pattern, nm.Pattern):
        return lambda number, scores: _selection.grouped(scores, pattern)
    num_inputs, num_outputs = shape
    sizes = [min(block, num_inputs - start) for start in range(0, num_inputs, block)]
    counts = jnp.array([_selection.beyond_share(pattern, s * num_outputs) for s in sizes])

    def choose(number: Int[Array, ""], scores: Float[Array, "G O"]) -> Bool[Array, "G O"]:
        is_input = jnp.arange(len(scores))[:, None] < jnp.array(sizes)[number]
        return _selection.of_all(jnp.where(is_input, scores, jnp.inf), counts[number])

    return choose


def _prune_block(
    before: _Rows,
    factor: Float[Array, "P P"],
    choose: Callable[[Float[Array, "G O"]], Bool[Array, "G O"]],
    group: int,
    *,
    update_weights: bool,
) -> tuple[_Rows, Float[Array, "P O"]]:
    """Prunes the inputs of a block; returns them, and w_j / U_jj of what is dropped."""
    diagonal = jnp.diagonal(factor)[:, None]

    def prune_group(
        number: Int[Array, ""], carry: tuple[_Rows, Float[Array, "P O"]]
    ) -> tuple[_Rows, Float[Array, "P O"]]:
        (weight, mask, scores), errors = carry
        start = number * group
        own, scale = (jax.lax.dynamic_slice_in_dim(x, start, group) for x in (weight, diagonal))
        scored = jnp.square(own / scale)
        mask, scores = _put(mask, choose(scored), start), _put(scores, scored, start)
        if not update_weights:
            return _Rows(weight, mask, scores), errors

        def prune_input(
            index: Int[Array, ""], carry: tuple[Float[Array, "P O"], Float[Array, "P O"]]
        ) -> tuple[Float[Array, "P O"], Float[Array, "P O"]]:
            weight, errors = carry
            pruned = jnp.where(mask[index], weight[index], 0)
            error = (weight[index] - pruned) / diagonal[index]
            weight = weight - factor[index][:, None] * error
            return weight.at[index].set(pruned), errors.at[index].set(error)

        weight, errors = jax.lax.fori_loop(start, start + group, prune_input, (weight, errors))
        return _Rows(weight, mask, scores), errors

    start = (before, jnp.zeros_like(before.weight))
    return jax.lax.fori_loop(0, len(diagonal) // group, prune_group, start)
