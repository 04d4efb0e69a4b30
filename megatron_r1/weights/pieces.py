"""Tensors a piece at a time: what every conversion and comparison does to the bytes that pass by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import xxhash

from megatron_r1.weights.reader import CheckpointReader, tensor_view

T = TypeVar("T")

PIECE_BYTES = 2 << 20
"""The part of a tensor that is in memory at once: small enough to stay in the processor's cache from the file that is
read to the file that is written. (One row, or query group, if that is larger.)"""


def task_bytes(total: int) -> int:
    """About what a worker writes between two records of its progress, of `total` bytes. A killed conversion has a few
    of these to do again for each worker. A 64th, so that workers end together, but no dust of small files, and of a
    large checkpoint at most 1 GiB.
    """
    return min(max(total // 64, 32 << 20), 1 << 30)


class PieceBuffer:
    """One buffer that every piece passes through, so that memory does not grow with the checkpoint."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, size: int) -> memoryview:
        """`size` writable bytes; what was taken before is overwritten."""
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]

    def read(self, reader: CheckpointReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in the buffer."""
        info = reader.tensors[name]
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        size = math.prod(shape) * info.dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=info.dtype)
        view = self.take(size)
        reader.read_rows(name, start, stop, view)
        return tensor_view(view, info.dtype, shape)


def row_ranges(num_rows: int, row_bytes: int, unit: int = 1, *, limit: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of at most `limit` bytes that cut only at multiples of `unit` rows. None for rows without
    bytes: there may be 2**50 of them."""
    if not row_bytes:
        return
    step = max(limit // (row_bytes * unit), 1) * unit
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def runs(items: Iterable[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Neighbours together, in runs whose sizes sum to at most `limit`, or of one larger item."""
    found: list[list[T]] = []
    total = 0
    for item in items:
        if not found or total + size(item) > limit:
            found.append([])
            total = 0
        found[-1].append(item)
        total += size(item)
    return found


def integers(value: object) -> list[int]:
    """`value`, if it is a list of integers (JSON's 64, not "64", 64.0 or true). ValueError otherwise."""
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"{str(value)[:100]} must be a list of integers")
    return value


@dataclass(slots=True)
class TensorRecord:
    """What a manifest says of one tensor. `nonfinite` counts its NaN and infinite numbers.

    XXH3 is chosen for its speed: it finds damage. It is no proof against forgery, which a manifest beside the weights
    could not be with any hash.
    """

    dtype: str
    shape: list[int]
    xxh3_128: str = ""
    nonfinite: int = 0

    @classmethod
    def from_json(cls, value: object) -> TensorRecord:
        """ValueError if `value` is not one."""
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "xxh3_128", "nonfinite"}:
            raise ValueError("a tensor's record must hold dtype, shape, xxh3_128 and nonfinite")
        texts, count = (value["dtype"], value["xxh3_128"]), value["nonfinite"]
        if not all(isinstance(text, str) for text in texts) or type(count) is not int:
            raise ValueError("a tensor's dtype and xxh3_128 must be texts and nonfinite a number")
        return cls(value["dtype"], integers(value["shape"]), value["xxh3_128"], count)

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": self.shape, "xxh3_128": self.xxh3_128, "nonfinite": self.nonfinite}


@dataclass(slots=True)
class TaskRecord:
    """What a finished task leaves for the end of the conversion, and for a resumed one. `file` is what it wrote to."""

    file: str
    size: int = 0
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    chunks: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TaskRecord:
        """ValueError if `value` is not one."""
        if set(value) != {"file", "size", "tensors", "chunks"} or not isinstance(value["tensors"], dict):
            raise ValueError("a record must hold file, size, tensors and chunks")
        tensors = {name: TensorRecord.from_json(record) for name, record in value["tensors"].items()}
        return cls(value["file"], value["size"], tensors, value["chunks"])

    def to_json(self) -> dict[str, Any]:
        tensors = {name: record.to_json() for name, record in self.tensors.items()}
        return {"file": self.file, "size": self.size, "tensors": tensors, "chunks": self.chunks}


@dataclass(slots=True)
class TensorDigest:
    """Collects a TensorRecord while the rows of a tensor pass in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    _hash: Any = field(default_factory=xxhash.xxh3_128)
    _nonfinite: int = 0

    def add(self, part: memoryview) -> None:
        self._hash.update(part)

    def count_nonfinite(self, part: torch.Tensor) -> None:
        self._nonfinite += nonfinite(part)

    def record(self) -> TensorRecord:
        dtype = str(self.dtype).removeprefix("torch.")
        return TensorRecord(dtype, list(self.shape), self._hash.hexdigest(), self._nonfinite)


def nonfinite(values: torch.Tensor) -> int:
    """How many numbers are NaN or infinite. One pass if there are none."""
    if not values.dtype.is_floating_point or not values.numel():
        return 0
    if values.dtype == torch.float8_e8m0fnu:  # no sign: all bits ones is the one NaN
        return int((values.view(torch.uint8) == 0xFF).sum())
    if values.dtype.itemsize == 1:  # e4m3: NaN only; torch has no minimum of it
        magnitude = values.view(torch.uint8) & 0x7F
        return int((magnitude == 0x7F).sum()) if int(magnitude.amax()) == 0x7F else 0
    low, high = torch.aminmax(values)
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return 0
    return int((~torch.isfinite(values)).sum())
