"""The header of a GGUF file: its keys, and where its tensors lie.

A file may come from anyone. Each length, count and offset is compared with the file's size before
anything is read or allocated by it; UserError says what is wrong. Versions 2 and 3 are read, the
latest; the numbers are little-endian.
"""

import dataclasses
import math
import os
import re
import struct

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from sharding.errors import UserError

# A value's type in the file → its format in `struct`; strings and arrays are read in steps.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MOST_AXES = 4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file; its values are read when they are used."""

    file: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as numpy has it: the last axis is contiguous
    data: np.ndarray  # bytes, the last axis in blocks of its kind


@dataclasses.dataclass(frozen=True)
class GgufFile:
    keys: dict[str, object]
    tensors: dict[str, Tensor]


def part_names(path: str) -> list[str]:
    """The files of the model that `path` is, or is a part of: NAME-00001-of-00003.gguf and so on.
    Only the named file is read."""
    count = read_file(path).keys.get("split.count", 0)
    if type(count) is not int or count < 0:
        raise UserError(
            f"{path}: its key split.count is {count!r}, no number of parts: download it again"
        )
    if count < 2:  # gguf-split writes 0 into a model that it has put together
        return [path]
    match = re.fullmatch(r"(.*-)(\d{5})(-of-\d{5}\.gguf)", path, re.DOTALL)
    if match is None or match[3] != f"-of-{count:05}.gguf":
        raise UserError(
            f"{path} is one of the {count} parts of a split model: name them as they were, "
            f"NAME-00001-of-{count:05}.gguf and so on, in one folder"
        )
    parts = [f"{match[1]}{part:05}{match[3]}" for part in range(1, count + 1)]
    missing = [part for part in parts if not os.path.isfile(part)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{path} is one of {count} parts, and {missing[0]} is missing{more}: download all parts"
        )
    return parts


def read_model(path: str) -> GgufFile:
    """The keys and tensors of a file, or of all parts of a split model."""
    parts = part_names(path)
    files = [read_file(part) for part in parts]
    keys, tensors = files[0].keys, {}
    for part, (name, file) in enumerate(zip(parts, files)):
        place = file.keys.get("split.no"), file.keys.get("split.count")
        whole = len(parts) == 1 and place[0] in (None, 0)
        if not whole and place != (part, len(parts)):
            raise UserError(
                f"{name}: its keys split.no and split.count are {place[0]} and {place[1]}, not "
                f"{part} and {len(parts)}: download all parts again"
            )
        for tensor in file.tensors.keys() & tensors.keys():
            raise UserError(f"{name}: tensor {tensor} is in {tensors[tensor].file} too")
        tensors |= file.tensors
    total = keys.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        what = "its parts hold" if len(parts) > 1 else "it holds"
        raise UserError(
            f"{path}: {what} {len(tensors)} tensors, not {total}: download all parts again"
        )
    return GgufFile(keys, tensors)


def read_file(path: str) -> GgufFile:
    """The keys and tensors of one file alone."""
    if "://" in path:
        raise UserError(f"{path}: GGUF files are read from disk: copy it here first")
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: give the path of a .gguf file")
    size = os.path.getsize(path)
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    return _Reader(path, data.view(np.ndarray)).file()


class _Reader:
    """Reads one file from its beginning on."""

    def __init__(self, path: str, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def file(self) -> GgufFile:
        start = bytes(self.data[:8])
        if start[:4] != b"GGUF":
            raise UserError(f"{self.path} is no GGUF file: it begins with {start!r}")
        version = int.from_bytes(start[4:], "little")
        if version not in (2, 3):
            big_endian = version and version % 2**16 == 0
            what = "big-endian" if big_endian else f"of GGUF version {version}"
            raise UserError(f"{self.path} is {what}: little-endian versions 2 and 3 are built")
        self.at = 8
        tensor_count, key_count = self.scalar("<Q"), self.scalar("<Q")
        keys = {}
        for _ in range(self.fits(key_count, 13, "keys")):
            name = self.string("the name of a key")
            if name in keys:
                self.fail(f"key {name} is there twice")
            keys[name] = self.value(self.scalar("<I"), f"key {name}")
        places = {}
        for _ in range(self.fits(tensor_count, 32, "tensors")):
            name = self.string("the name of a tensor")
            if name in places:
                self.fail(f"tensor {name} is there twice")
            places[name] = self.tensor_place(name)
        return GgufFile(keys, self.tensors(places, keys.get("general.alignment", 32)))

    def fail(self, what: str):
        raise UserError(f"{self.path} is no whole GGUF file ({what}): download it again")

    def fits(self, count: int, size: int, what: str) -> int:
        """`count`, if so many things of at least `size` bytes are left in the file."""
        if count * size > len(self.data) - self.at:
            self.fail(f"it ends before its {count} {what}")
        return count

    def take(self, size: int, what: str) -> np.ndarray:
        self.at += self.fits(size, 1, f"bytes of {what}")
        return self.data[self.at - size : self.at]

    def scalar(self, kind: str) -> int | float | bool:
        return struct.unpack(kind, self.take(struct.calcsize(kind), "a number"))[0]

    def string(self, what: str) -> str:
        text = bytes(self.take(self.scalar("<Q"), what))
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is no UTF-8")

    def value(self, kind: int, what: str) -> object:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string(what)
        kind, count = (self.scalar("<I"), self.scalar("<Q")) if kind == ARRAY else (kind, 0)
        if kind == STRING:
            return [self.string(what) for _ in range(self.fits(count, 8, f"strings of {what}"))]
        if kind not in SCALARS:
            self.fail(f"{what} has a value of the unknown type {kind}")
        size = struct.calcsize(SCALARS[kind])
        return np.frombuffer(self.take(count * size, what), SCALARS[kind]).tolist()

    def tensor_place(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """(shape, type, offset) of a tensor."""
        axes = self.scalar("<I")
        if not 1 <= axes <= MOST_AXES:
            self.fail(f"tensor {name} has {axes} axes")
        shape = tuple(self.scalar("<Q") for _ in range(axes))[::-1]
        if 0 in shape:
            self.fail(f"tensor {name} has the shape {shape}")
        return shape, self.scalar("<I"), self.scalar("<Q")

    def tensors(self, places: dict, alignment: object) -> dict[str, Tensor]:
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r} and no power of two")
        start = end = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in sorted(places.items(), key=lambda place: place[1][2]):
            if kind not in GGML_QUANT_SIZES:
                raise UserError(
                    f"{self.path}: tensor {name} is of quantization type {kind}, which is not "
                    "built: take another quantization"
                )
            kind = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                self.fail(f"rows of tensor {name} are no whole blocks of {kind.name}")
            shape_bytes = (*shape[:-1], shape[-1] // block * block_bytes)
            first, size = start + offset, math.prod(shape_bytes)
            if offset % alignment or first < end:
                self.fail(f"tensor {name} lies at {offset}: unaligned, or over another tensor")
            end = first + size
            if end > len(self.data):
                self.fail(f"it ends before tensor {name}")
            data = self.data[first:end].reshape(shape_bytes)
            tensors[name] = Tensor(self.path, kind, shape, data)
        return tensors
