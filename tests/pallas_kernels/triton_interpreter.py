"""Runs Triton kernels in Triton's interpreter, on PyTorch tensors on the CPU.

Triton decides when it is imported whether to interpret: hence a process of its own.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import traceback

import jax
import ml_dtypes
import numpy as np

from pallas_kernels import triton_call


@functools.cache
def outcomes(module):
    """Returns what the checks of a module found, by name, from `run_checks` in there."""
    result = subprocess.run(
        [sys.executable, "-m", module],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def run_checks(check, names):
    """Prints what went wrong with each check, "" for nothing."""
    _multiply_numbers()
    triton_call.call = _call
    found = {}
    for name in names:
        try:
            check(name)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


def _call(kernel, *arrays, out_shape, programs, resources, target, zeroed=False, **constants):
    """Stands in for `triton_call.call`; what a kernel forgets to write stays NaN."""

    def run(*arrays):
        outputs = [_to_torch(np.full(x.shape, 0 if zeroed else np.nan, x.dtype)) for x in out_shape]
        kernel[(programs,)](*(_to_torch(x) for x in arrays), *outputs, **constants)
        return tuple(_from_torch(x, y.dtype) for x, y in zip(outputs, out_shape, strict=True))

    return jax.pure_callback(run, tuple(out_shape), *arrays)


def _to_torch(array):
    import torch

    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _from_torch(tensor, dtype):
    import torch

    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy().view(dtype)


def _multiply_numbers():
    """The interpreter multiplies the bit patterns of bfloat16: widens them before."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = widened
