"""Layers of equal kind, stacked and scanned: compile time does not grow with depth."""

import dataclasses
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from sparseformer_jax.model.read_only import read_only
from sparseformer_jax.sparsity.layers import LayerWeights

Kind = TypeVar("Kind", bound=Hashable)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reports:
    """What layers return beside the residual stream, by name.

    Attributes:
      losses: auxiliary, summed over weighted tokens and layers.
      diagnostics: of a block a scalar, of a stack one number a layer that reports it.
      statistics: sums over tokens; of a stack by the path of their module, the layers stacked
        as its variables are.
    """

    losses: Any = dataclasses.field(default_factory=dict)
    diagnostics: Any = dataclasses.field(default_factory=dict)
    statistics: Any = dataclasses.field(default_factory=dict)


def group_layers(kinds: Sequence[Kind]) -> list[tuple[tuple[Kind, ...], int]]:
    """Returns the layers as units that repeat: [(kinds of one unit, repeats)].

    Each unit is the one that covers most of the layers left, the shortest of those:
    a a b b b -> [(a,) 2, (b,) 3] and a b a b a -> [(a, b) 2, (a,) 1].
    """
    groups, start = [], 0
    while start < len(kinds):
        rest = kinds[start:]
        period, repeats = max(
            ((p, _repeats(rest, p)) for p in range(1, len(rest) // 2 + 1)),
            key=lambda unit: (unit[0] * unit[1] if unit[1] > 1 else 1, -unit[0]),
            default=(1, 1),
        )
        if repeats == 1:
            period = 1
        groups.append((tuple(rest[:period]), repeats))
        start += period * repeats
    return groups


def _repeats(kinds: Sequence[Kind], period: int) -> int:
    """How often the first `period` kinds stand one after another at the start."""
    repeats = 1
    while list(kinds[repeats * period : (repeats + 1) * period]) == list(kinds[:period]):
        repeats += 1
    return repeats


class LayerStack(nnx.Module):
    """A unit of blocks repeated: parameters have a leading axis of repeats, and scan.

    Args:
      makers: one for each block of the unit, called with `rngs`.
      keys: of the initialisation of each layer, R times that of the unit.
      remat: what the backward pass recomputes: "none" keeps all activations, "full"
        none but each unit's input, a name in `jax.checkpoint_policies` what it says.
    """

    def __init__(
        self,
        makers: Sequence[Callable[..., nnx.Module]],
        keys: Key[Array, "layers"],
        remat: str,
    ) -> None:
        self.repeats = len(keys) // len(makers)
        self.remat = remat
        columns = keys.reshape(self.repeats, len(makers)).T
        self.unit = nnx.List([_stack(*each) for each in zip(makers, columns, strict=True)])

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        keys: Key[Array, "layers"] | None,
        step: Any = 0,
        weights: jax.Array | None = None,
        sparsity_keys: Key[Array, "layers"] | None = None,
    ) -> tuple[jax.Array, Reports]:
        """Returns x after all layers, and what they report.

        `keys` are the randomness of each layer, None in evaluation; `step` is training's;
        `weights` are those of tokens in losses and statistics. With `sparsity_keys` each layer's
        weights are made sparse here, as training has them; without they are used as they are.
        """
        graphdef, state = nnx.split(self.unit)

        def body(x: jax.Array, xs: tuple[Any, Any, Any]) -> tuple[jax.Array, Reports]:
            state, keys, sparsity_keys = xs
            unit = nnx.merge(graphdef, state)
            reports = []
            block: Any
            for index, block in enumerate(unit):
                key = None if keys is None else keys[index]
                if sparsity_keys is not None and block.sparse_weights is not None:
                    block, report = _sparse(block, step, sparsity_keys[index], x, weights)
                    reports.append(_of_unit(report, f"unit/{index}"))
                with read_only(block):
                    x, report = block(x, positions, segment_ids, key, step, weights)
                reports.append(_of_unit(report, f"unit/{index}"))
            return x, join_reports(reports)

        xs = (state, self._by_unit(keys), self._by_unit(sparsity_keys))
        x, reports = jax.lax.scan(rematerialized(body, self.remat), x, xs)
        return x, dataclasses.replace(
            reports,
            losses={name: jnp.sum(values) for name, values in reports.losses.items()},
            diagnostics={name: v.reshape(-1) for name, v in reports.diagnostics.items()},
        )

    def _by_unit(self, keys: Key[Array, "layers"] | None) -> Key[Array, "R unit"] | None:
        return None if keys is None else keys.reshape(self.repeats, len(self.unit))

    def init_cache(self, batch_size: int, size: int) -> list[Any]:
        """Returns the empty caches of each block of the unit, of all repeats."""
        unit: Any = self.unit
        return [block.attention.init_cache(batch_size, size, self.repeats) for block in unit]

    def decode(
        self,
        x: jax.Array,
        start: jax.Array,
        caches: list[Any],
        lengths: jax.Array | None,
        step: Any,
    ) -> tuple[jax.Array, list[Any]]:
        """Returns x of the next tokens after all layers, and the caches with them."""
        graphdef, state = nnx.split(self.unit)

        def body(carry: tuple[Any, list[Any]], xs: tuple[Any, Any]) -> tuple[Any, None]:
            (x, caches), (state, repeat) = carry, xs
            unit: Any = nnx.merge(graphdef, state)
            written = []
            for block, cache in zip(unit, caches, strict=True):
                with read_only(block):
                    x, own = block.decode(x, start, cache, lengths, repeat, step)
                written.append(own)
            return (x, written), None

        # Caches are carried, not scanned: so they are changed in place.
        return jax.lax.scan(body, (x, caches), (state, jnp.arange(self.repeats)))[0]

    def blocks(self) -> Iterator[Any]:
        """Returns the blocks one after another, each with parameters of its own."""
        graphdef, state = nnx.split(self.unit)
        for repeat in range(self.repeats):
            yield from nnx.merge(graphdef, jax.tree.map(operator.itemgetter(repeat), state))


def _sparse(
    block: Any, step: Any, key: jax.Array, x: jax.Array, weights: jax.Array | None
) -> tuple[Any, Reports]:
    """A block with sparse weights; their losses count once a step, so as all tokens together."""
    sparse_weights: LayerWeights = block.sparse_weights
    block, losses, diagnostics = sparse_weights.apply(block, step, key)
    total = math.prod(x.shape[:2]) if weights is None else jnp.sum(weights)
    return block, Reports({name: total * value for name, value in losses.items()}, diagnostics)


def rematerialized(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Returns the function with its backward pass recomputing what the policy says."""
    if policy == "none":
        return function
    if policy == "full":
        return jax.checkpoint(function, prevent_cse=False)  # inside scan: no CSE to prevent
    chosen = getattr(jax.checkpoint_policies, policy)
    return jax.checkpoint(function, policy=chosen, prevent_cse=False)


def join_reports(reports: Sequence[Reports]) -> Reports:
    """Returns losses summed, diagnostics concatenated, and all statistics."""
    losses: dict[str, jax.Array] = {}
    diagnostics: dict[str, list[jax.Array]] = {}
    statistics: dict[str, jax.Array] = {}
    for report in reports:
        for name, value in report.losses.items():
            losses[name] = losses.get(name, 0.0) + value
        for name, values in report.diagnostics.items():
            diagnostics.setdefault(name, []).append(values)
        statistics |= report.statistics
    joined = {name: jnp.concatenate(values) for name, values in diagnostics.items()}
    return Reports(losses, joined, statistics)


def prefixed(statistics: Mapping[str, jax.Array], path: str) -> dict[str, jax.Array]:
    """Returns statistics of a module by its path in another."""
    return {f"{path}/{name}": value for name, value in statistics.items()}


def layer_keys(key: Key[Array, ""], num_layers: int) -> Key[Array, "layers"]:
    """Returns a key a layer, which depends on the layer's number and not on the others."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_layers))


def _stack(maker: Callable[..., nnx.Module], keys: Key[Array, "layers"]) -> nnx.Module:
    """One module whose parameters carry a leading axis of independent initialisations."""

    def state(key: jax.Array) -> nnx.State:
        return nnx.state(maker(rngs=nnx.Rngs(key)))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: maker(rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.vmap(state)(keys))


def _of_unit(report: Reports, path: str) -> Reports:
    """The report of a block as one that joins with others of its unit."""
    return Reports(
        report.losses,
        {name: jnp.asarray(value)[None] for name, value in report.diagnostics.items()},
        prefixed(report.statistics, path),
    )
