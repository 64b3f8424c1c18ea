"""Names by layer outside the scan, stacked arrays inside, and the way from one to the other."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")

_STACKED = re.compile(r"stacks/(\d+)/unit/(\d+)/(.+)")


class LayerNames:
    """Which layers stand in each stacked array, and the names they go by elsewhere.

    Entry r of "stacks/1/unit/0/mlp/up/kernel" [R, ...], in a unit of U blocks that starts
    at layer l, is "layers/7/mlp/up/kernel" [...] with 7 = l + r U.

    Args:
      shapes: of all variables of a model, by their stacked names.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        found = {name: _STACKED.fullmatch(name) for name in shapes}
        units: dict[int, int] = {}
        repeats: dict[int, int] = {}
        for name, match in found.items():
            if match:
                stack, unit = int(match[1]), int(match[2])
                units[stack] = max(units.get(stack, 0), unit + 1)
                repeats[stack] = shapes[name][0]
        first, firsts = 0, {}
        for stack in sorted(units):
            firsts[stack] = first
            first += units[stack] * repeats[stack]
        self._names: dict[str, list[str]] = {}
        for name, match in found.items():
            self._names[name] = [name]
            if match:
                stack, start = int(match[1]), firsts[int(match[1])] + int(match[2])
                layers = (start + r * units[stack] for r in range(repeats[stack]))
                self._names[name] = [f"layers/{layer}/{match[3]}" for layer in layers]
        self._all = {name for names in self._names.values() for name in names}

    @staticmethod
    def are_stacked(names: Iterable[str]) -> bool:
        """Returns whether some of the names are of stacked arrays."""
        return any(_STACKED.fullmatch(name) for name in names)

    def of(self, name: str) -> list[str]:
        """Returns the names by layer of a stacked array; of any other, its own."""
        return self._names[name]

    def split(self, tree: Tree, put: Callable[[jax.Array], jax.Array] = lambda x: x) -> Tree:
        """Returns the tree with an entry a layer for each stacked array.

        Args:
          tree: arrays, in which any dictionary may have names as keys.
          put: what is done with each entry as soon as it is made.
        """

        def split(values: dict[str, Any]) -> dict[str, Any]:
            entries = {}
            for name, value in values.items():
                names = self._names[name]
                if names == [name]:
                    entries[name] = value
                    continue
                leaves, treedef = jax.tree.flatten(value)
                columns = [list(map(put, _rows(leaf))) for leaf in leaves]
                for layer, *row in zip(names, *columns, strict=True):
                    entries[layer] = jax.tree.unflatten(treedef, row)
            return entries

        return map_named(split, tree, self._names.keys())

    def stack(self, tree: Tree, put: Callable[[jax.Array], jax.Array] = lambda x: x) -> Tree:
        """Returns the tree with layers stacked again: the inverse of `split`.

        Args:
          tree: arrays, in which any dictionary may have names by layer as keys.
          put: what is done with each array, before it is stacked.

        Raises:
          KeyError: some layers of a stack are there and others are not.
        """

        def stack(values: dict[str, Any]) -> dict[str, Any]:
            stacked = {}
            for name, names in self._names.items():
                if names == [name] and name in values:
                    stacked[name] = jax.tree.map(put, values[name])
                elif any(layer in values for layer in names):
                    rows = [values[layer] for layer in names]
                    stacked[name] = jax.tree.map(lambda *x: jnp.stack(list(map(put, x))), *rows)
            return stacked

        return map_named(stack, tree, self._all)


def map_named(
    function: Callable[[dict[str, Any]], dict[str, Any]], tree: Any, names: Iterable[str]
) -> Any:
    """Returns the tree with each dictionary by names of variables, all of them known, changed."""
    known = set(names)

    def is_named(node: Any) -> bool:
        return isinstance(node, dict) and bool(node) and node.keys() <= known

    return jax.tree.map(lambda x: function(x) if is_named(x) else x, tree, is_leaf=is_named)


@jax.jit
def _rows(x: jax.Array) -> list[jax.Array]:
    """Cuts the first axis, all rows in one program."""
    return [x[row] for row in range(x.shape[0])]
