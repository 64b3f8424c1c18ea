"""Where the golden vectors lie: SPARSEFORMER_GOLDEN, or the folder beside this file."""

import json
import os
import pathlib
from typing import Any

import numpy as np

ROOT = pathlib.Path(os.environ.get("SPARSEFORMER_GOLDEN", pathlib.Path(__file__).parent / "data"))


def settings(method: str, name: str = "settings.json") -> Any:
    """Returns a settings file of a method's folder."""
    return json.loads((ROOT / method / name).read_text(encoding="utf-8"))


def arrays(method: str, name: str) -> dict[str, np.ndarray]:
    """Returns all arrays of one .npz file of a method's folder."""
    with np.load(ROOT / method / name, allow_pickle=False) as file:
        return dict(file)


def unpack_bits(packed: np.ndarray, length: int) -> np.ndarray:
    """Returns booleans from bits packed along the last axis, highest bit first."""
    return np.unpackbits(packed, axis=-1, count=length).astype(bool)
