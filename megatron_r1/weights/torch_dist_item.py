"""One item of a torch_dist data file: a tensor in torch.save's form. Where do its numbers lie?"""

from __future__ import annotations

import functools
import io
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from megatron_r1.errors import CheckpointError

_HEAD_BYTES = 4096
"""More than torch.save writes before a tensor's numbers."""


@functools.lru_cache(maxsize=256)
def item_frame(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the numbers of such a tensor: all that an item is, but for them.

    The zip's checksums are left out: torch.load does not read them, and the manifest has better ones.
    """
    with_checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        file = io.BytesIO()
        torch.save(torch.empty(sizes, dtype=dtype), file)
    finally:
        torch.serialization.set_crc32_options(with_checksums)
    item = file.getbuffer()
    start = next(place for name, place, _ in _stored_records(bytes(item[:_HEAD_BYTES])) if name == "data/0")
    return bytes(item[:start]), bytes(item[start + math.prod(sizes) * dtype.itemsize :])


@dataclass(frozen=True, slots=True)
class _Form:
    """What an item's own pickle says of its tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    in_order: bool


class ItemReader:
    """Finds the numbers of items. Remembers the descriptions that it has seen: tensors of one shape share them."""

    def __init__(self) -> None:
        self._forms: dict[bytes, _Form] = {}

    def start_of_numbers(
        self, handle: int, offset: int, length: int, dtype: torch.dtype, sizes: tuple[int, ...], what: str
    ) -> int:
        """Where in the file the numbers of the item at `offset` start, whole and in C order. CheckpointError if it is
        not a tensor of `dtype` and `sizes` (dimensions of 1 aside)."""
        try:
            head = os.pread(handle, min(_HEAD_BYTES, length), offset)
        except OSError as error:
            raise CheckpointError(f"{what}: cannot be read ({error.strerror})") from error
        records = {name: place for name, *place in _stored_records(head)}
        if "data.pkl" not in records or "data/0" not in records:
            raise CheckpointError(f"{what}: damaged, or not written by torch.save")
        description = head[slice(*records["data.pkl"])]
        form = self._forms.get(description)
        if form is None:
            form = self._forms[description] = _read_form(_Window(handle, offset, length), what)
        if not form.in_order:
            raise CheckpointError(f"{what}: stored in an order that is not supported")
        if form.dtype != dtype or _without_ones(form.shape) != _without_ones(sizes):
            raise CheckpointError(
                f"{what}: the item is {form.dtype}{list(form.shape)}, its metadata says {dtype}{list(sizes)}; the "
                "checkpoint is damaged: fetch it again"
            )
        start = records["data/0"][0]
        if start + math.prod(sizes) * dtype.itemsize > length:
            raise CheckpointError(f"{what}: truncated or damaged: its numbers do not fit into its {length:,} bytes")
        return offset + start


def _read_form(window: _Window, what: str) -> _Form:
    try:
        with torch.serialization.skip_data():
            tensor = torch.load(cast(IO[bytes], window), weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged pickle leads it to
        said = str(error).splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"{what}: truncated or damaged ({said[0]})") from None
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{what}: holds a {type(tensor).__name__}; it must be a tensor")
    in_order = tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.storage_offset()
    return _Form(tensor.dtype, tuple(tensor.shape), in_order)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _stored_records(head: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, where the content starts, where it ends) of a zip's first records, up to the numbers.

    torch.save's local headers give no lengths; a record ends at the descriptor that follows it.
    """
    position = 0
    while (position := head.find(b"PK\x03\x04", position)) >= 0 and position + 30 <= len(head):
        name_length, extra_length = struct.unpack_from("<HH", head, position + 26)
        name = head[position + 30 : position + 30 + name_length].decode("ascii", "replace").split("/", 1)[-1]
        start = position + 30 + name_length + extra_length
        end = head.find(b"PK\x07\x08", start)
        yield name, start, end
        if name == "data/0":
            return
        position = start


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, handle: int, offset: int, length: int) -> None:
        self._handle, self._offset, self._length, self._position = handle, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")[: max(self._length - self._position, 0)]
        count = os.preadv(self._handle, [target], self._offset + self._position) if len(target) else 0
        self._position += count
        return count
