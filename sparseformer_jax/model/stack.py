"""Layers of equal kind, stacked and scanned: compile time does not grow with depth."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from sparseformer_jax.model.read_only import read_only

# Auxiliary losses and diagnostics by name.
Reports = tuple[dict[str, jax.Array], dict[str, jax.Array]]
Kind = TypeVar("Kind", bound=Hashable)


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
      repeats: how often the unit stands in the stack.
      remat: what the backward pass recomputes: "none" keeps all activations, "full"
        none but each unit's input, a name in `jax.checkpoint_policies` what it says.
      rngs: random streams for the parameters.
    """

    def __init__(
        self,
        makers: Sequence[Callable[..., nnx.Module]],
        repeats: int,
        remat: str,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.repeats = repeats
        self.remat = remat
        self.unit = nnx.List([_stack(maker, repeats, rngs) for maker in makers])

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        rng: jax.Array | None,
    ) -> tuple[jax.Array, Reports]:
        """Returns x after all layers, losses summed and diagnostics in layer order."""
        graphdef, state = nnx.split(self.unit)

        def body(x: jax.Array, xs: tuple[Any, jax.Array | None]) -> tuple[jax.Array, Reports]:
            state, rng = xs
            unit = nnx.merge(graphdef, state)
            rngs = [None] * len(unit) if rng is None else jax.random.split(rng, len(unit))
            reports = []
            for block, block_rng in zip(unit, rngs, strict=True):
                with read_only(block):
                    x, report = block(x, positions, segment_ids, block_rng)
                reports.append(report)
            return x, _stack_reports(reports)

        rngs = None if rng is None else jax.random.split(rng, self.repeats)
        x, (losses, diagnostics) = jax.lax.scan(rematerialized(body, self.remat), x, (state, rngs))
        losses = {name: jnp.sum(values) for name, values in losses.items()}
        return x, (losses, {name: values.reshape(-1) for name, values in diagnostics.items()})


def rematerialized(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Returns the function with its backward pass recomputing what the policy says."""
    if policy == "none":
        return function
    if policy == "full":
        return jax.checkpoint(function, prevent_cse=False)  # inside scan: no CSE to prevent
    chosen = getattr(jax.checkpoint_policies, policy)
    return jax.checkpoint(function, policy=chosen, prevent_cse=False)


def join_reports(reports: Sequence[Reports]) -> Reports:
    """Returns losses summed and diagnostics concatenated, by name."""
    losses: dict[str, jax.Array] = {}
    diagnostics: dict[str, list[jax.Array]] = {}
    for stack_losses, stack_diagnostics in reports:
        for name, value in stack_losses.items():
            losses[name] = losses.get(name, 0.0) + value
        for name, values in stack_diagnostics.items():
            diagnostics.setdefault(name, []).append(values)
    return losses, {name: jnp.concatenate(values) for name, values in diagnostics.items()}


def _stack(maker: Callable[..., nnx.Module], repeats: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters carry a leading axis of independent initialisations."""

    def state(key: jax.Array) -> nnx.State:
        return nnx.state(maker(rngs=nnx.Rngs(params=key)))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: maker(rngs=nnx.Rngs(params=0))))
    return nnx.merge(graphdef, jax.vmap(state)(jax.random.split(rngs.params(), repeats)))


def _stack_reports(reports: Sequence[Reports]) -> Reports:
    """Joins the reports of the blocks of a unit."""
    expanded = [
        (losses, {name: jnp.asarray(value)[None] for name, value in diagnostics.items()})
        for losses, diagnostics in reports
    ]
    return join_reports(expanded)
