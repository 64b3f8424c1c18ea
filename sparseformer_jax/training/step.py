"""One optimiser step: loss, accumulated gradients, clipping, update, learned state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparseformer_jax.model.loss import cross_entropy
from sparseformer_jax.training import weight_sparsity
from sparseformer_jax.training.by_layer import ByLayer
from sparseformer_jax.training.learned_state import update_variables
from sparseformer_jax.training.state import ModelDef, Params, TrainState

Batch = dict[str, jax.Array]  # each [A, B/A, T]: accumulation pieces, rows, tokens
Metrics = dict[str, Any]

# No number of a step: what is drawn for sparse weights is drawn for nothing else.
_SPARSITY = 2**32 - 1


def make_train_step(
    model_def: ModelDef, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the function (state, batch) -> (state, metrics), to be compiled.

    The loss is the mean over all weighted targets of the whole batch, so the pieces of
    an accumulated batch give the gradient of the batch at once:

        sum_i w_i (nll_i + z_loss log(Z_i)^2 + auxiliary losses_i) / sum_i w_i

    Diagnostics are means over a piece; each piece counts by its share of the weights.
    Gradients add up, are measured, clipped and applied in float32, whatever the dtypes of
    parameters and optimiser state. Variables that no gradient moves follow the statistics of
    the whole batch, which the forward pass takes with the variables of before.

    Metrics are scalars, but for "nonfinite": name -> whether a parameter's gradient, or the
    square of its new value or of a variable's, is, for each layer that is stacked in it; and
    "layers", the diagnostics that methods want layer by layer, see `ByLayer`. Norms are global,
    over the trainable parameters: "grad_norm" before clipping, "update_norm" of what is added,
    "param_norm" after it is added; "variable_norm" is that of the variables.
    """
    train = model_def.config.train
    names = model_def.trainable()
    seed = model_def.config.seed
    by_layer = ByLayer(model_def.abstract_model())

    def piece_loss(
        trainable: Params, state: TrainState, batch: Batch, rng: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Params]]:
        params = {**state.params, **trainable}
        sparsity_key = _sparsity_key(model_def, state.step)
        model = model_def.model(params, state.variables, state.step, sparsity_key)
        inputs = (batch[name] for name in ("inputs", "positions", "segment_ids", "weights"))
        output = model.features(*inputs, rng=rng)
        nll, log_z2 = cross_entropy(model, output.hidden, batch["targets"], batch["weights"])
        share = jnp.sum(batch["weights"]) / total
        auxiliary = {name: value / total for name, value in output.losses.items()}
        loss = (nll + train.z_loss * log_z2) / total + sum(auxiliary.values())
        reports = {name: share * jnp.mean(value) for name, value in output.diagnostics.items()}
        layers = jax.tree.map(lambda x: share * x, by_layer.chosen(output.diagnostics))
        metrics = {"loss": nll / total, "total_loss": loss, **auxiliary, **reports}
        if layers:
            metrics["layers"] = layers
        return loss, (metrics, output.statistics)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable = {name: state.params[name] for name in names}
        total = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)  # a constant is no array

        def gradients(piece: Batch, rng: jax.Array) -> tuple[Params, tuple[Metrics, Params]]:
            grad = jax.grad(piece_loss, has_aux=True)
            return _in_float32(grad(trainable, state, piece, rng, total))

        grads, (metrics, statistics) = _accumulate(gradients, batch, rng)
        grad_squares = _squares(model_def, grads)
        norm = _norm(grad_squares)
        grads = _clip(grads, norm, model_def.config.optimizer.clip_norm)
        updates, opt_state = _update(optimizer, grads, state.opt_state, trainable)
        updated = optax.apply_updates(trainable, updates)
        variables = update_variables(model_def, state.variables, statistics)
        params, variables, opt_state, changes = weight_sparsity.update(
            model_def,
            trainable,
            {**state.params, **updated},
            variables,
            opt_state,
            state.step + 1,
            learning_rate,
        )
        updated = {name: params[name] for name in names}
        squares = _squares(model_def, updated)
        variable_squares = _squares(model_def, _floating(variables))
        metrics |= {
            "grad_norm": norm,
            "update_norm": _norm(_squares(model_def, updates)),
            "param_norm": _norm(squares),
            "learning_rate": learning_rate,
            "tokens": total,
            **changes,
            "nonfinite": {n: ~jnp.isfinite(grad_squares[n] + squares[n]) for n in names}
            | {n: ~jnp.isfinite(x) for n, x in variable_squares.items()},
        }
        if variable_squares:
            metrics["variable_norm"] = _norm(variable_squares)
        return TrainState(state.step + 1, params, variables, opt_state), metrics

    return train_step


def _sparsity_key(model_def: ModelDef, step: jax.Array) -> jax.Array | None:
    """The key of a step's noise in sparse weights: one for all pieces, as their masks are."""
    if not model_def.targets:
        return None
    stream = jax.random.fold_in(jax.random.key(model_def.config.seed), _SPARSITY)
    return jax.random.fold_in(stream, step)


def _accumulate(
    gradients: Callable[[Batch, jax.Array], tuple[Params, Any]], batch: Batch, rng: jax.Array
) -> tuple[Params, Any]:
    """Sums gradients, metrics and statistics over the pieces of a batch."""
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


def _floating(variables: Params) -> Params:
    """Those that could be other than finite."""
    return {n: x for n, x in variables.items() if jnp.issubdtype(x.dtype, jnp.floating)}


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
