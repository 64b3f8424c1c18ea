"""One optimiser step: loss, accumulated gradients, clipping, update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparseformer_jax.model.loss import cross_entropy
from sparseformer_jax.training.state import ModelDef, Params, TrainState

Batch = dict[str, jax.Array]  # each [A, B/A, T]: accumulation pieces, rows, tokens
Metrics = dict[str, Any]


def make_train_step(
    model_def: ModelDef, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the function (state, batch) -> (state, metrics), to be compiled.

    The loss is the mean over all weighted targets of the whole batch, so the pieces of
    an accumulated batch give the gradient of the batch at once:

        sum_i w_i (nll_i + z_loss log(Z_i)^2) / sum_i w_i + auxiliary losses

    Auxiliary losses and diagnostics are means over a piece; each piece counts by its share of
    the weights. Gradients add up, are measured, clipped and applied in float32, whatever
    the dtypes of parameters and optimiser state.

    Metrics are scalars, but for "nonfinite": parameter name -> whether its gradient, or the
    square of its new value, is, for each layer that is stacked in it. Norms are global, over
    the trainable parameters: "grad_norm" before clipping, "update_norm" of what is added,
    "param_norm" after it is added.
    """
    train = model_def.config.train
    names = model_def.trainable()
    seed = model_def.config.seed

    def piece_loss(
        trainable: Params, state: TrainState, batch: Batch, rng: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        model = model_def.model({**state.params, **trainable}, state.variables, state.step)
        output = model.features(batch["inputs"], batch["positions"], batch["segment_ids"], rng=rng)
        nll, log_z2 = cross_entropy(model, output.hidden, batch["targets"], batch["weights"])
        share = jnp.sum(batch["weights"]) / total
        auxiliary = {name: share * value for name, value in output.losses.items()}
        loss = (nll + train.z_loss * log_z2) / total + sum(auxiliary.values())
        reports = {name: share * jnp.mean(value) for name, value in output.diagnostics.items()}
        return loss, {"loss": nll / total, "total_loss": loss, **auxiliary, **reports}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable = {name: state.params[name] for name in names}
        total = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def gradients(piece: Batch, rng: jax.Array) -> tuple[Params, Metrics]:
            grad = jax.grad(piece_loss, has_aux=True)
            return _in_float32(grad(trainable, state, piece, rng, total))

        grads, metrics = _accumulate(gradients, batch, rng)
        grad_squares = _squares(model_def, grads)
        norm = _norm(grad_squares)
        grads = _clip(grads, norm, model_def.config.optimizer.clip_norm)
        updates, opt_state = _update(optimizer, grads, state.opt_state, trainable)
        updated = optax.apply_updates(trainable, updates)
        squares = _squares(model_def, updated)
        metrics |= {
            "grad_norm": norm,
            "update_norm": _norm(_squares(model_def, updates)),
            "param_norm": _norm(squares),
            "learning_rate": schedule(state.step),
            "tokens": total,
            "nonfinite": {n: ~jnp.isfinite(grad_squares[n] + squares[n]) for n in names},
        }
        params = {**state.params, **updated}
        return dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state
        ), metrics

    return train_step


def _accumulate(
    gradients: Callable[[Batch, jax.Array], tuple[Params, Metrics]], batch: Batch, rng: jax.Array
) -> tuple[Params, Metrics]:
    """Sums gradients and metrics over the pieces of a batch."""
    pieces = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if pieces == 1:
        return gradients(first, rng)

    def add(total: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(*xs)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, first, rng))
    return jax.lax.scan(add, zeros, (batch, jax.random.split(rng, pieces)))[0]


def _squares(model_def: ModelDef, tree: Params) -> dict[str, jax.Array]:
    """The squared norm of every array, layer by layer, summed in float32."""
    return {
        name: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=model_def.layer_axes(name))
        for name, x in tree.items()
    }


def _norm(squares: dict[str, jax.Array]) -> jax.Array:
    """The norm of all arrays together."""
    return jnp.sqrt(sum(map(jnp.sum, squares.values())))


def _clip(grads: Params, norm: jax.Array, limit: float) -> Params:
    """Scales gradients whose global norm exceeds the limit; 0: never."""
    if not limit:
        return grads
    factor = limit / jnp.maximum(norm, limit)
    return {name: g * factor for name, g in grads.items()}


def _update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
) -> tuple[Params, optax.OptState]:
    """Runs the optimiser with the partitioner in charge: Muon's products cross shards.

    It computes in float32; its state keeps its dtypes.
    """

    def update(*arguments: Any) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(*_in_float32(arguments))
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), state, opt_state)

    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, opt_state))
    return jax.sharding.auto_axes(update, out_sharding=shardings)(grads, opt_state, params)


def _in_float32(tree: Any) -> Any:
    """The tree with its floating-point arrays in float32."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)
