"""The machine that kernels are built for: the one at hand, or another on request."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Hashable, Iterator
from typing import Literal

import jax

Platform = Literal["cpu", "tpu", "cuda", "rocm"]


@dataclasses.dataclass(frozen=True)
class Target:
    """What selection and kernels ask about a machine.

    Attributes:
        platform: "cpu", "tpu", "cuda" or "rocm".
        name: the device kind, as JAX gives it.
        compute_capability: ten times NVIDIA's number, 90 for Hopper; None elsewhere.
        interpret: what `pallas_call` takes: False to compile, True or the parameters of
            an interpreter to run kernels of this target on a CPU.
    """

    platform: Platform
    name: str = ""
    compute_capability: int | None = None
    interpret: Hashable = False


_requested: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def use(target: Target) -> Iterator[None]:
    """Builds kernels for another machine: to compile without it, or to interpret.

    Selection happens while a function is traced, and JAX does not know of the target:
    trace inside the context, a function that was not traced before.
    """
    token = _requested.set(target)
    try:
        yield
    finally:
        _requested.reset(token)


def current() -> Target:
    """Returns the target asked for by `use`, else that of the default device."""
    requested = _requested.get()
    return _of_device(_default_device()) if requested is None else requested


def _default_device() -> jax.Device:
    device = jax.config.values["jax_default_device"]
    if isinstance(device, str):
        return jax.devices(device)[0]
    return jax.devices()[0] if device is None else device


def _of_device(device: jax.Device) -> Target:
    if device.platform != "gpu":
        platform: Platform = "tpu" if device.platform == "tpu" else "cpu"
        return Target(platform, device.device_kind)
    capability = str(device.compute_capability)
    digits = capability.replace(".", "")
    if not digits.isdigit():  # AMD names architectures: gfx90a
        return Target("rocm", device.device_kind)
    return Target("cuda", device.device_kind, int(digits))
