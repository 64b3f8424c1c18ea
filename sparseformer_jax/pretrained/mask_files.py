"""Masks beside the weights of an exported folder, packed, at most a bit a weight.

`masks.safetensors` holds bytes by the names of weights, which are [outputs, inputs]. Its metadata
say of each, as JSON, the shape and the pattern: with n:m along the inputs the numbers of the masks
of groups (`packing.pack_groups`), 0.75 bits a weight of 2:4; with null a bit each (`pack_bits`).
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.packages import optional
from sparseformer_jax.sparsity import nm, packing
from sparseformer_jax.sparsity.nm import Pattern

MASKS_FILE = "masks.safetensors"

Mask = tuple[str, Bool[np.ndarray, "O I"], Pattern | None]


def write_masks(folder: Path, masks: Iterable[Mask]) -> int:
    """Writes masks by the names of weights, each with the pattern it may have; returns the bytes.

    A mask that is not of its pattern, as while training is dense, is written in bits.
    """
    tensors, forms = {}, {}
    for name, kept, pattern in masks:
        if pattern is not None and not _has_numbers(kept, pattern):
            pattern = None
        packed = packing.pack_groups(kept, pattern) if pattern else packing.pack_bits(kept)
        tensors[name] = packed
        shown = None if pattern is None else str(pattern)
        forms[name] = json.dumps({"shape": list(kept.shape), "pattern": shown})
    optional("safetensors.numpy").save_file(tensors, folder / MASKS_FILE, metadata=forms)
    return sum(packed.nbytes for packed in tensors.values())


def _has_numbers(kept: Bool[np.ndarray, "O I"], pattern: Pattern) -> bool:
    return packing.bits_of_group(pattern) is not None and nm.holds(kept, pattern, axis=-1)


def read_masks(folder: Path) -> dict[str, Bool[np.ndarray, "O I"]]:
    """Returns the masks of an exported folder by the names of weights, True keeps.

    Raises:
      ConfigError: there are none, or they are damaged.
    """
    path = folder / MASKS_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; the folder is of a dense model")
    safetensors = optional("safetensors")
    masks = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name, text in file.metadata().items():
                form = json.loads(text)
                packed, shape = file.get_tensor(name), tuple(form["shape"])
                masks[name] = (
                    packing.unpack_bits(packed, shape)
                    if form["pattern"] is None
                    else packing.unpack_groups(packed, shape, Pattern.parse(form["pattern"]))
                )
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: is damaged: {error}") from None
    return masks
