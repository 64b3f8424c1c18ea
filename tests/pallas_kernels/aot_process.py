"""Runs compilations for machines that are not there, in a process of their own.

The compilers' plugins must be found before JAX starts, and theirs is not the process to
share with eight simulated CPU devices.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

# No TPU is at hand that two processes could fight for.
_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # As users compile, not as tests do.
    "XLA_FLAGS": "",
}
_NEEDED = ("libtpu", "jax_plugins.xla_cuda13", "jax_triton", "triton")


def run(module: str, *arguments: str) -> Any:
    """Returns what a module prints last, as JSON, when it is run as a script.

    Skips the test where the compilers are not installed; .ci/run allows no skip.
    """
    for needed in _NEEDED:
        if not _is_installed(needed):
            pytest.skip(f"{needed} is not installed: pip install '.[aot]'")
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | _SETTINGS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
