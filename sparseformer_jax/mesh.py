"""The device mesh, and the one table that maps logical axis names to its axes."""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

from sparseformer_jax.checks import ConfigError

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis of a parameter or an activation -> mesh axes that divide it. "embed"
# is the residual width of a parameter; activations keep theirs whole (None).
LOGICAL_AXES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("data", "fsdp"),
    "seq": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Returns the mesh of the given axis sizes, all axes explicit; over all devices if None.

    Axes come in the order of `AXES`, so neighbouring devices share `context` and
    `tensor`, whose traffic is heaviest.

    Raises:
      ValueError: an axis is unknown, or the sizes do not multiply to the devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"mesh axes {unknown} are unknown; choose from {AXES}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices; "
            f"there are {len(devices)}"
        )
    types = (AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def spec(*axes: str | None) -> PartitionSpec:
    """Returns the partition of an array whose dimensions have these logical names.

    Raises:
      ValueError: a name is unknown, or two dimensions want the same mesh axis.
    """
    used: list[str] = []
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis not in LOGICAL_AXES:
            raise ValueError(f"logical axis {axis!r} is unknown; known: {list(LOGICAL_AXES)}")
        mesh_axes = LOGICAL_AXES[axis]
        collision = set(mesh_axes) & set(used)
        if collision:
            raise ValueError(f"logical axes {axes} use mesh axis {collision.pop()!r} twice")
        used += mesh_axes
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def is_active() -> bool:
    """Returns whether the current mesh is one of `make_mesh`, with explicit axes.

    Without one, and under `jax.sharding.auto_axes`, modules run unannotated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == AXES and all(t == AxisType.Explicit for t in mesh.axis_types)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns `x` divided by the logical names of its dimensions, if a mesh is active."""
    return jax.reshard(x, spec(*axes)) if is_active() else x


def num_shards(axis: str | None) -> int:
    """Returns how many parts the current mesh cuts a dimension of this logical name into."""
    if not is_active():
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in LOGICAL_AXES[axis])


def gathered_axes(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Returns the axes of a parameter in use: whole along `embed`, as FSDP gathers it."""
    return tuple(None if axis == "embed" else axis for axis in axes)


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to the others of a run on several hosts.

    Without arguments the cluster environment (TPU pod, Slurm, MPI, Kubernetes) tells;
    where there is none, or JAX has started, as in a notebook, the processes stay as they are.

    Raises:
      ConfigError: only some of the three arguments are given, JAX has already started
        without the others, or they cannot be reached.
    """
    arguments = (coordinator_address, num_processes, process_id)
    given = [argument is not None for argument in arguments]
    if any(given) and not all(given):
        raise ConfigError(
            "coordinator_address, num_processes and process_id go together; "
            f"got {coordinator_address!r}, {num_processes!r}, {process_id!r}"
        )
    if coordinator_address is not None:
        port = re.search(r".:(\d+)$", coordinator_address)
        # To a port that cannot be, JAX would wait for minutes.
        if port is None or not 1 <= int(port[1]) <= 65535:
            raise ConfigError(
                f"coordinator_address={coordinator_address!r}: must be HOST:PORT, with a port from"
                " 1 to 65535"
            )
    try:
        jax.distributed.initialize(*arguments)
    except (ValueError, RuntimeError) as error:
        # What jax says where no cluster names a coordinator, and once it has started.
        expected = ("coordinator_address", "must be called before", "only be called once")
        if any(given) or not any(text in str(error) for text in expected):
            line = str(error).partition("\n")[0]
            raise ConfigError(f"coordinator_address={coordinator_address!r}: {line}") from error


def is_primary() -> bool:
    """Returns whether this process writes logs and small files for all."""
    return jax.process_index() == 0
