"""Files of evaluation results: each says what was evaluated, and none takes another's place."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.workdir import write_atomically


def file_name(results: Mapping[str, Any]) -> str:
    """Returns eval_SPLIT_STEP.json, with a digest of text and overrides where there are such."""
    name = f"eval_{results['split']}_{results['step']}"
    if results["overrides"]:
        identity = json.dumps([results["text"], results["overrides"]], sort_keys=True)
        name += f"_{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    return f"{name}.json"


def check_folder(field: str, path: Path) -> None:
    """Refuses a file that cannot be written, before the work of filling it is done.

    Raises:
      ConfigError: its folder is missing or read-only, or the path is a folder itself.
    """
    if path.is_dir():
        raise ConfigError(f"{field}={path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{field}={path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{field}={path}: {path.parent} cannot be written; name another file")


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Returns what a reader must know of the numbers: what attention left out of what it chose."""
    overflow = results.get("overflow", 0.0)
    if not overflow:
        return []
    return [
        f"overflow is {overflow:.3g}: for so large a part of the queries a capacity of attention "
        "leaves out keys that were chosen; raise it to see them"
    ]


def write(path: Path, results: Mapping[str, Any]) -> str:
    """Writes results as JSON and returns a line that says where, and what they replace."""
    replaced = ", in place of an earlier file" if path.exists() else ""
    write_atomically(path, json.dumps(results, indent=2) + "\n")
    return f"written to {path}{replaced}"
