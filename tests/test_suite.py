"""The suite itself, on machines that lack some of what it uses."""

import subprocess
import sys

HIDDEN = ("array_record", "beartype", "grain", "ml_collections", "tensorflow_datasets")
COMMAND = f"""
import sys
sys.modules.update(dict.fromkeys({HIDDEN}))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest where the hidden modules cannot be imported."""
    command = [sys.executable, "-c", COMMAND, "-n", "0", "--collect-only", "-q", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_kernels_are_tested_without_beartype_and_the_trainers_libraries():
    result = run("-v", "-m", "device")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "shapes are not checked: beartype is not installed" in result.stdout
    assert "test_device.py" in result.stdout
    assert "tests/attention" not in result.stdout


def test_no_skips_refuses_what_is_missing():
    result = run("--no-skips", "-m", "device")
    assert result.returncode == 4
    assert "--no-skips: install what is missing: beartype" in result.stderr
