"""State that follows statistics of the tokens, not gradients: centroids, masks."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from sparseformer_jax.attention.base import Attention
from sparseformer_jax.model.stack import prefixed
from sparseformer_jax.training.state import ModelDef, Params


def update_variables(model_def: ModelDef, variables: Params, statistics: Params) -> Params:
    """Returns the variables after a step: every layer's as its method's `update` says.

    Args:
      model_def: of the model.
      variables: what no gradient moves, by stacked names.
      statistics: of the whole batch, by the same paths.

    Raises:
      ValueError: a method returns what is no variable of it, or one of another shape or dtype.
    """
    if not variables:
        return variables
    # The partitioner divides whatever operations a method takes, as it does the optimiser's.
    specs = {name: jax.typeof(x).sharding.spec for name, x in variables.items()}

    def update(variables: Params, statistics: Params) -> Params:
        changed: Params = {}
        for path, attention in _modules(model_def):
            of_layer = functools.partial(type(attention).update, attention.options)
            own = _below(path, variables)
            new = jax.vmap(of_layer)(own, _below(path, statistics)) if own else {}
            _check(path, own, new)
            changed |= prefixed(new, path)
        return {**variables, **changed}

    return jax.sharding.auto_axes(update, out_sharding=specs)(variables, statistics)


def _modules(model_def: ModelDef) -> Iterator[tuple[str, Attention]]:
    """The attention modules by path, of abstract arrays; layers that scan share theirs."""
    model = model_def.abstract_model()
    for number, stack in enumerate(model.stacks):
        block: Any
        for index, block in enumerate(stack.unit):
            yield f"stacks/{number}/unit/{index}/attention", block.attention


def _below(path: str, tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The entries below a path, by the rest of their names."""
    start = f"{path}/"
    return {n.removeprefix(start): x for n, x in tree.items() if n.startswith(start)}


def _check(path: str, old: dict[str, jax.Array], new: dict[str, jax.Array]) -> None:
    for name, value in new.items():
        before = jax.typeof(old[name]).str_short() if name in old else "no variable"
        if jax.typeof(value).str_short() != before:
            raise ValueError(
                f"{path}/{name}: update returns {jax.typeof(value).str_short()} for {before}"
            )
