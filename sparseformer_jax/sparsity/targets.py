"""Which weights are made sparse, by patterns on their names."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from flax import nnx

from sparseformer_jax import mesh
from sparseformer_jax.checks import ConfigError, suggest
from sparseformer_jax.sparsity.base import Target, WeightSparsity
from sparseformer_jax.sparsity.nm import Pattern

# Short names of what papers prune; anything else is a regular expression on names.
GROUPS = {
    "ff": r"^layers/\d+/mlp/(gate|up|down)/kernel$",
    "qkv": r"^layers/\d+/attention/(query|key|value)/kernel$",
    "all": r"^layers/\d+/(mlp/(gate|up|down)|attention/(query|key|value|out))/kernel$",
}

KERNEL = "kernel"


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One entry of `sparsity.targets`."""

    text: str
    expression: re.Pattern[str]
    pattern: Pattern | None


def parse(targets: Sequence[str]) -> list[_Choice]:
    """Returns the choices of `sparsity.targets`, each "NAMES=n:m", or "NAMES" for given masks.

    Raises:
      ValueError: there are none, or one cannot be read.
    """
    if not targets:
        raise ConfigError("targets=(): nothing is made sparse; name weights, as 'ff=2:4'")
    choices = []
    for text in targets:
        names, equals, pattern = text.rpartition("=")
        names = names if equals else text
        if not names:
            raise ConfigError(f"targets={text!r}: must be NAMES=n:m, as 'ff=2:4'")
        try:
            expression = re.compile(GROUPS.get(names, names))
        except re.error as error:
            raise ConfigError(
                f"targets={text!r}: neither one of {', '.join(GROUPS)} nor a regular expression:"
                f" {error}"
            ) from None
        try:
            choices.append(_Choice(text, expression, Pattern.parse(pattern) if equals else None))
        except ValueError as error:
            raise ConfigError(f"targets={text!r}: {error}") from None
    return choices


def check_patterns(targets: Sequence[str]) -> None:
    """Checks that every target has an n:m.

    Raises:
      ValueError: there are none, or one has no pattern or cannot be read.
    """
    for choice in parse(targets):
        if choice.pattern is None:
            raise ValueError(
                f"targets={choice.text!r}: has no pattern; write NAMES=n:m, as 'ff=2:4'"
            )


def choose(
    targets: Sequence[str], variables: Mapping[str, nnx.Variable], method: WeightSparsity
) -> dict[str, Target]:
    """Returns the weights that `sparsity.targets` names: the first that fits a name counts.

    Args:
      targets: as in the config.
      variables: abstract, of one layer each, by their names by layer.
      method: that makes them sparse.

    Raises:
      ConfigError: a target names nothing, or what cannot be sparse; its groups do not divide an
        axis, or devices would cut one.
    """
    chosen: dict[str, Target] = {}
    for choice in parse(targets):
        found = [name for name in variables if choice.expression.search(name)]
        found = [name for name in found if issubclass(variables[name].type, nnx.Param)]
        if not found:
            kernels = [name for name in variables if re.match(rf"layers/0/.*/{KERNEL}$", name)]
            raise ConfigError(
                f"sparsity.targets={choice.text!r}: matches no weight"
                f"{suggest(choice.text.rpartition('=')[0], (*GROUPS, *kernels))}"
            )
        for name in found:
            chosen.setdefault(name, _target(choice, name, variables[name], method))
    return chosen


def _target(choice: _Choice, name: str, variable: nnx.Variable, method: WeightSparsity) -> Target:
    metadata = variable.get_metadata()
    if "in_dims" not in metadata or not name.startswith("layers/"):
        raise ConfigError(
            f"sparsity.targets={choice.text!r}: matches {name}, which is no projection of a layer;"
            " embeddings, norms, biases and the output head stay dense"
        )
    axes = metadata["axes"]
    axis = metadata["in_dims"] - 1 - len(axes)
    if choice.pattern is not None:
        _check_groups(choice, name, variable.shape[axis], axes[axis], method)
    return Target(choice.pattern, axis, len(axes))


def _check_groups(
    choice: _Choice, name: str, size: int, axis: str | None, method: WeightSparsity
) -> None:
    assert choice.pattern is not None
    m = method.largest_group(choice.pattern)
    if size % m:
        raise ConfigError(
            f"sparsity.targets={choice.text!r}: groups of {m} do not divide the {size} entries that"
            f" {name} sums over"
        )
    shards = mesh.num_shards(axis)
    if size % (m * shards):
        raise ConfigError(
            f"sparsity.targets={choice.text!r}: groups of {m} would be cut by the {shards} devices"
            f" that share the {size} entries {name} sums over; make it a multiple of {m * shards}"
        )
