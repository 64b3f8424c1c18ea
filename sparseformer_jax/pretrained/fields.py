"""Settings that a pretrained model brings along, read one by one and checked."""

from collections.abc import Mapping
from typing import Any

from sparseformer_jax.checks import ConfigError, convert

_REQUIRED: Any = object()


class Fields:
    """Named settings of a file; one that is null counts as absent.

    Args:
      values: as the file has them.
      where: names the file in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._values = {name: value for name, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def is_null(self, name: str) -> bool:
        """Returns whether a setting is there as null, where absence means something else."""
        return name in self._nulls

    def get(self, name: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """Returns a setting of a kind: a type, or what else `checks.convert` understands.

        Raises:
          ConfigError: it is absent and has no default, or is of another kind.
        """
        if name not in self._values:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where}: {name} is missing")
            return default
        return convert(f"{self.where}: {name}", self._values[name], kind)

    def section(self, name: str) -> "Fields":
        """Returns the settings below a name; none where it is absent."""
        return Fields(self.get(name, dict, {}), f"{self.where}: {name}")

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses a setting that is there and is none of those the model can follow."""
        if name in self._values and self._values[name] not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ConfigError(
                f"{self.where}: {name}={self._values[name]!r}: only {known} is supported"
            )

    def refuse(self, name: str, why: str) -> ConfigError:
        """Returns the error that a setting cannot be followed."""
        return ConfigError(f"{self.where}: {name}={self._values.get(name)!r}: {why}")
