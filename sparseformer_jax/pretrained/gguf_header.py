"""The header of a GGUF file, read strictly: no number in it is believed before it is checked.

    "GGUF"  version u32  tensors u64  fields u64
    fields   name string  type u32  value
    tensors  name string  dimensions u32  sizes u64..  type u32  offset u64
    padding to `general.alignment`, then the tensors, each at its offset

A string is its length u64 and UTF-8; an array is a type u32, a length u64 and values. All is
little-endian. Source: the GGUF specification of ggml, versions 2 and 3.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.parts import Parts

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # unless general.alignment says another
_MAX_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
# Types of numbers, by their numbers in the specification; 7 is a boolean, a byte.
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}

# The fewest bytes that an item can have: what bounds how many there can be.
_MIN_FIELD = 8 + 4 + 1
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
      shape: outermost dimension first, as in NumPy.
      type: name of its quantisation, as "Q4_K".
      start: where its bytes begin in the file.
      num_bytes: how many they are.
    """

    shape: tuple[int, ...]
    type: str
    start: int
    num_bytes: int


class GgufHeader:
    """Fields and tensors of a GGUF file.

    Args:
      parts: the file.
      sizes: of each quantisation, by its number: name, entries of a block and bytes of one.

    Attributes:
      fields: by name; arrays of numbers are NumPy's, those of strings are lists.
      tensors: by name.

    Raises:
      ConfigError: a name, length, size or offset cannot be; the line says which.
    """

    def __init__(self, parts: Parts, sizes: dict[int, tuple[str, int, int]]) -> None:
        self._parts, self._sizes = parts, sizes
        self._at = 0
        self._what = "the header"
        if self._take(4).tobytes() != _MAGIC:
            raise ConfigError(f"{parts.name}: is no GGUF file")
        version = self._number(4)
        if version not in _VERSIONS:
            raise self._wrong(f"version {version}; known are {_VERSIONS}, little-endian")
        num_tensors = self._count("the number of tensors", _MIN_TENSOR)
        num_fields = self._count("the number of fields", _MIN_FIELD)
        self.fields: dict[str, Any] = {}
        for index in range(num_fields):
            self._what = f"the name of field {index}"
            name = self._string()
            if name in self.fields:
                raise self._wrong(f"{name} is there twice")
            self._what = f"field {name}"
            self.fields[name] = self._value(self._number(4))
        infos = self._infos(num_tensors)
        self._what = "the header"
        self.tensors = self._placed(infos)

    def _infos(self, num_tensors: int) -> dict[str, tuple[list[int], int, int]]:
        """Sizes, type and offset of each tensor."""
        infos: dict[str, tuple[list[int], int, int]] = {}
        for index in range(num_tensors):
            self._what = f"the name of tensor {index}"
            name = self._string()
            if name in infos:
                raise self._wrong(f"{name} is there twice")
            self._what = f"tensor {name}"
            dimensions = self._number(4)
            if dimensions > _MAX_DIMENSIONS:
                raise self._wrong(f"{dimensions} dimensions, more than {_MAX_DIMENSIONS}")
            sizes = [self._number(8) for _ in range(dimensions)]
            infos[name] = (sizes, self._number(4), self._number(8))
        return infos

    def _placed(self, infos: dict[str, tuple[list[int], int, int]]) -> dict[str, GgufTensor]:
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment={alignment!r} is no power of two")
        data = self._at + -self._at % alignment
        tensors = {name: self._tensor(name, data, alignment, *info) for name, info in infos.items()}
        end, before = data, "the header"
        for name in sorted(
            tensors, key=lambda name: (tensors[name].start, tensors[name].num_bytes)
        ):
            tensor = tensors[name]
            if tensor.start < end:
                raise self._wrong(f"tensor {name} overlaps {before}")
            end, before = tensor.start + tensor.num_bytes, name
        return tensors

    def _tensor(
        self, name: str, data: int, alignment: int, sizes: list[int], kind: int, offset: int
    ) -> GgufTensor:
        self._what = f"tensor {name}"
        if kind not in self._sizes:
            raise self._wrong(f"type {kind} is unknown")
        type_name, block, block_bytes = self._sizes[kind]
        if not sizes or 0 in sizes:
            raise self._wrong(f"sizes {sizes} hold nothing")
        if sizes[0] % block:
            raise self._wrong(f"rows of {sizes[0]} are no blocks of {block}, as {type_name} has")
        num_bytes = math.prod(sizes) // block * block_bytes
        if offset % alignment:
            raise self._wrong(f"offset {offset} is no multiple of the alignment, {alignment}")
        if data + offset + num_bytes > self._parts.size:
            raise self._wrong(
                f"{num_bytes} bytes at offset {offset} end beyond the file of {self._parts.size}"
            )
        return GgufTensor(tuple(reversed(sizes)), type_name, data + offset, num_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            return self._take(np.dtype(_NUMBERS[kind]).itemsize).view(_NUMBERS[kind])[0].item()
        if kind != _ARRAY:
            raise self._wrong(f"value of type {kind}, which is unknown")
        kind = self._number(4)
        if kind == _STRING:
            return [self._string() for _ in range(self._count("its length", 8))]
        if kind not in _NUMBERS:
            raise self._wrong(f"array of type {kind}, which is unknown")
        dtype = np.dtype(_NUMBERS[kind])
        length = self._count("its length", dtype.itemsize)
        return self._take(length * dtype.itemsize).view(dtype).copy()

    def _string(self) -> str:
        length = self._count("a length", 1)
        try:
            return self._take(length).tobytes().decode()
        except UnicodeDecodeError:
            raise self._wrong("text that is no UTF-8") from None

    def _count(self, what: str, smallest: int) -> int:
        """A number of items of so many bytes at least, all of which the file can hold."""
        count = self._number(8)
        if count * smallest > self._parts.size - self._at:
            raise self._wrong(f"{what} is {count}, more than the file can hold")
        return count

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size).tobytes(), "little")

    def _take(self, length: int) -> np.ndarray:
        try:
            taken = self._parts.read(self._at, length)
        except ValueError:
            raise self._wrong("the file ends here; it is cut") from None
        self._at += length
        return taken

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._parts.name}: {self._what}: {what}")
