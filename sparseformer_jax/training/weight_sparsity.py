"""State of weight sparsity in training: its start, and what changes it once a step."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from sparseformer_jax.sparsity.layers import weight_key
from sparseformer_jax.training.layer_names import map_named

if TYPE_CHECKING:
    from sparseformer_jax.training.state import ModelDef, Params


def start(
    model_def: "ModelDef",
    params: "Params",
    variables: "Params",
    key: jax.Array,
    priors: Mapping[str, jax.Array],
    targets: Collection[str] | None = None,
) -> tuple["Params", "Params"]:
    """Returns parameters and variables with the state of sparse weights, made of the weights.

    Args:
      model_def: of the model.
      params: with weights as training starts with them; they are not changed.
      variables: beside them.
      key: of what is drawn.
      priors: masks to start from by the names of weights; weights without one start afresh.
      targets: the names of weights whose state is made; None: of all.
    """
    targets = model_def.targets if targets is None else targets
    if not targets:
        return params, variables
    method = model_def.sparsity
    paths = {name: method.state_names(name) for name in targets}
    specs = {path: model_def.spec(path) for own in paths.values() for path in own.values()}

    def make(params: "Params", priors: Mapping[str, jax.Array], key: jax.Array) -> "Params":
        made: Params = {}
        for name in targets:
            layers = model_def.names.of(name)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(
                key, jnp.array(list(map(_number, layers)))
            )
            path = layers[0].split("/", 2)[2]

            def init(weight: Any, key: Any, prior: Any, name: str = name, path: str = path) -> Any:
                target = model_def.targets[name]
                return method.init(weight, target, weight_key(key, path), prior)

            state = jax.vmap(init)(params[name], keys, priors.get(name))
            made |= {paths[name][own]: value for own, value in state.items()}
        return made

    weights = {name: params[name] for name in targets}
    made = jax.sharding.auto_axes(make, out_sharding=specs)(weights, dict(priors), key)
    return (
        {name: made.get(name, x) for name, x in params.items()},
        {name: made.get(name, x) for name, x in variables.items()},
    )


def update(
    model_def: "ModelDef",
    old: "Params",
    params: "Params",
    variables: "Params",
    opt_state: optax.OptState,
    step: jax.Array,
    learning_rate: Any,
) -> tuple["Params", "Params", optax.OptState, dict[str, jax.Array]]:
    """Returns parameters, variables and the optimiser's state after a step, and metrics.

    Args:
      model_def: of the model.
      old: trainable parameters before the optimiser's step.
      params: all of them after it.
      variables: beside them.
      opt_state: of the optimiser.
      step: that comes next.
      learning_rate: of the step that was done.
    """
    if not model_def.targets:
        return params, variables, opt_state, {}
    method = model_def.sparsity

    def run(arguments: Any) -> Any:
        old, params, variables, opt_state, step, learning_rate = arguments
        values, changed = {**params, **variables}, {}
        for name, target in model_def.targets.items():
            state = model_def.sparsity_state(name, values)
            before = old.get(name, params[name])
            weight, new = method.update(before, params[name], state, target, step, learning_rate)
            values |= {path: new[own] for own, path in method.state_names(name).items()}
            if name in old:
                values[name] = weight
            if "mask" in state:
                changed[name] = state["mask"] != new["mask"]
        metrics = {}
        if changed:
            moved = sum(jnp.sum(x, dtype=jnp.float32) for x in changed.values())
            metrics["mask_change"] = moved / sum(x.size for x in changed.values())
        if method.resets_moments:
            opt_state = _reset(opt_state, params.keys(), changed)
        return (
            {name: values[name] for name in params},
            {name: values[name] for name in variables},
            opt_state,
            metrics,
        )

    arguments = (old, params, variables, opt_state, step, learning_rate)
    shapes = jax.eval_shape(run, arguments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, variables, opt_state))
    metrics = {name: jax.sharding.PartitionSpec() for name in shapes[3]}
    return jax.sharding.auto_axes(run, out_sharding=(*specs, metrics))(arguments)


def _reset(
    opt_state: optax.OptState, names: Collection[str], changed: Mapping[str, jax.Array]
) -> optax.OptState:
    """The optimiser's state with zeros where a mask changed."""

    def zero(where: jax.Array, moment: Any) -> Any:
        # Of a weight that another optimiser moves, or none, there is no array.
        return jax.tree.map(lambda x: jnp.where(where, jnp.zeros((), x.dtype), x), moment)

    def zeroed(moments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: zero(changed[name], moment) if name in changed else moment
            for name, moment in moments.items()
        }

    return map_named(zeroed, opt_state, names)


def _number(layer_name: str) -> int:
    return int(layer_name.split("/")[1])
