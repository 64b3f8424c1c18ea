"""Guards a module's variables during the forward pass, where a change would be lost."""

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import nnx


@contextlib.contextmanager
def read_only(module: nnx.Module) -> Iterator[None]:
    """A context at whose end every variable of the module must hold what it held.

    Layers run on copies that scan, `shard_map` and remat make, so a change would not
    leave them: what a layer has to tell, it returns.

    Raises:
      RuntimeError: a variable was changed or added, or a stored key advanced.
    """
    before = _values(module)
    yield
    after = _values(module)
    changed = [name for name, value in after.items() if value is not before.get(name)]
    if changed:
        raise RuntimeError(
            f"{', '.join(changed)}: changed during the forward pass of "
            f"{type(module).__name__}, where the change would be lost; return it instead"
        )


def _values(module: nnx.Module) -> dict[str, Any]:
    """The value of every variable by its path."""
    return {
        "/".join(map(str, path)): leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }
