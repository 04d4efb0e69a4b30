"""Megatron's torch_dist checkpoints, read and written a piece at a time.

The format is torch.distributed.checkpoint's: `.metadata` (pickled dataclasses: which chunk of which tensor lies where),
data files of consecutive items, each written by torch.save. Megatron's own dist_checkpointing loads what is written
here, under any layout. It needs every tensor of a rank in memory, which a conversion does not have: so the pieces are
written here, with torch's classes and in torch.save's form. Reading takes any checkpoint that Megatron saved, and
makes no object of a pickle but those that describe tensors.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.fp8 import fp8_entries
from megatron_r1.weights.placement import Placement, place
from megatron_r1.weights.reader import TensorInfo, byte_view, read_exactly
from megatron_r1.weights.table import build_table

METADATA = ".metadata"
MANIFEST = "megatron_r1_manifest.json"
"""What a conversion leaves beside the weights: each tensor's dtype, shape and hash."""

CONTENT = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""Megatron's content metadata: each layer has keys of its own, the experts of a layer share one key."""

_METADATA_CLASSES = (
    "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
    "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta",
)  # fmt: skip
_HEAD_BYTES = 4096
"""More than torch.save writes before a tensor's numbers."""

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}


def is_torch_dist(folder: Path) -> bool:
    return (folder / METADATA).is_file()


# ---- writing


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One written item: rows of a key (and of one expert), and where its bytes are."""

    key: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ChunkRecord:
        fields: dict[str, Any] = dict(value)
        for name in ("global_shape", "offsets", "sizes"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


class DataFile:
    """A data file that is being written. Items follow one another."""

    def __init__(self, path: Path) -> None:
        self._name, self._position = path.name, 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def add(
        self,
        key: str,
        dtype: torch.dtype,
        global_shape: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        numbers: Iterable[memoryview],
    ) -> ChunkRecord:
        """Append the chunk of `sizes` at `offsets` of a tensor; `numbers` are its bytes in order, in any slices."""
        position = self._position
        before, after = _item_frame(dtype, sizes)
        self._write(memoryview(before))
        for part in numbers:
            self._write(part)
        self._write(memoryview(after))
        length = self._position - position
        expected = len(before) + math.prod(sizes) * dtype.itemsize + len(after)
        assert length == expected, f"{key}: {length} bytes written, {expected} expected"
        name = str(dtype).removeprefix("torch.")
        return ChunkRecord(key, name, global_shape, offsets, sizes, self._name, position, length)

    def _write(self, part: memoryview) -> None:
        done = 0
        while done < len(part):
            done += os.write(self._handle, part[done:])
        self._position += done

    def close(self) -> int:
        """Returns the file's size in bytes."""
        os.close(self._handle)
        return self._position


@functools.lru_cache(maxsize=256)
def _item_frame(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
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


def write_metadata(folder: Path, chunks: Iterable[ChunkRecord]) -> None:
    """Make a folder of data files a checkpoint. `.metadata` is written last: without it nothing takes the folder for
    one."""
    tensors: dict[str, dcp.TensorStorageMetadata] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
        entry = tensors.get(chunk.key)
        if entry is None:
            properties = dcp.TensorProperties(dtype=getattr(torch, chunk.dtype))
            entry = dcp.TensorStorageMetadata(properties, torch.Size(chunk.global_shape), [])
            tensors[chunk.key] = entry
        storage[dcp.MetadataIndex(chunk.key, offsets, len(entry.chunks))] = _StorageInfo(
            chunk.file, chunk.position, chunk.length
        )
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets, sizes))
    torch.save({"content_metadata": CONTENT}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT | {"common_backend_version": 1}))
    metadata = dcp.Metadata(state_dict_metadata=dict(tensors), storage_data=storage)
    with open(folder / METADATA, "wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


# ---- reading


def read_metadata(folder: Path) -> dcp.Metadata:
    """The unpickled `.metadata`. CheckpointError if it is not one, or points outside the folder."""
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not the metadata of a torch_dist checkpoint ({error})") from None
    if not isinstance(metadata, dcp.Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path}: not the metadata of a torch_dist checkpoint")
    for index, info in metadata.storage_data.items():
        file = info.relative_path
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path}: {index.fqn} points outside the folder ({file!r}); this is refused")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _ALLOWED = {  # noqa: RUF012
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Inert


class _Inert:
    """Stands for every other object of the pickle (Megatron keeps its save plans there): nothing of it is run."""

    def __new__(cls, *arguments: object, **more: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **more: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, *items: object) -> None:
        """For pickled subclasses of list and dict, like the next three."""

    def extend(self, items: object) -> None: ...

    def add(self, item: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [row, row + rows) and columns [column, column + columns) of a key (of one expert), stored as an item whose
    own row `row_in_item` is the first of them."""

    row: int
    rows: int
    column: int
    columns: int
    row_in_item: int
    info: _StorageInfo


class TorchDistFolder:
    """A CheckpointReader of a torch_dist checkpoint, under the Hugging Face names of `shape`'s table.

    Keys that the table does not know (optimizer, random states, extra states) are not read. MTP layers that the
    checkpoint lacks are absent. Raises CheckpointError for a key that is missing or has another shape.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.metadata = read_metadata(folder)
        self._handles: dict[str, int] = {}
        self._data_offset: tuple[tuple[str, int], int] | None = None
        self._described: dict[bytes, bool] = {}
        self._chunks: dict[tuple[str, int | None], list[_Chunk]] = {}
        self._of: dict[str, tuple[Placement, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        stored = self.metadata.state_dict_metadata
        for entry in build_table(shape):
            placed = [place(entry, shape)]
            if entry.fp8 and shape.fp8_block and entry.kind != "qkv" and placed[0].key not in stored:
                placed = [place(half, shape) for half in fp8_entries(entry, shape.fp8_block)]
            for placement in placed:
                if placement.key in stored:
                    self._add(placement, stored[placement.key])
                elif not entry.name.startswith("mtp."):
                    raise CheckpointError(f"{folder}: key {placement.key} is missing; it is of another model")
        self._add_aliases(shape)
        self._index_chunks({placement.key for placement, _ in self._of.values()})

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read_rows(self, name: str, start: int, stop: int, out: memoryview) -> None:
        placement, part = self._of[name]
        row_bytes = self.tensors[name].row_bytes
        for segment in placement.segments:
            first, last = max(start, segment.hf_row), min(stop, segment.hf_row + segment.rows)
            if segment.part == part and first < last:
                row = segment.row + first - segment.hf_row
                target = out[(first - start) * row_bytes : (last - start) * row_bytes]
                self._read_key(placement, row, row + last - first, target, row_bytes)

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        self.read_rows(name, 0, info.num_rows, byte_view(whole))
        return whole[:, start:stop].contiguous()

    def _add(self, placement: Placement, stored: object) -> None:
        expected = placement.global_shape
        size = tuple(stored.size) if isinstance(stored, dcp.TensorStorageMetadata) else None
        padded = placement.entry.kind == "vocabulary" and size is not None and size[0] >= expected[0]
        if size is None or (size != expected and not (padded and size[1:] == expected[1:])):
            found = f"has shape {list(size)}" if size is not None else "is not a tensor"
            raise CheckpointError(f"{self.folder}: key {placement.key} {found}, config.json implies {list(expected)}")
        assert isinstance(stored, dcp.TensorStorageMetadata)
        for part, name in enumerate(placement.entry.hf):
            full = placement.entry.hf_shapes[part]
            self.tensors[name] = TensorInfo(stored.properties.dtype, full, str(self.folder))
            self._of[name] = placement, part

    def _add_aliases(self, shape: ModelShape) -> None:
        """The names under which the converted folder repeated a tensor; for other checkpoints, the table's own."""
        manifest = self.folder / MANIFEST
        if manifest.exists():
            aliases = json.loads(manifest.read_text(encoding="utf-8"))["aliases"]
        else:
            with_mtp = any(key.startswith("mtp.") for key in self.metadata.state_dict_metadata)
            aliases = {alias: entry.hf[0] for entry in build_table(shape) if with_mtp for alias in entry.aliases}
        for alias, name in aliases.items():
            if name in self._of:
                self.tensors[alias], self._of[alias] = self.tensors[name], self._of[name]

    def _index_chunks(self, keys: set[str]) -> None:
        experts = {placement.key: placement.leading is not None for placement, _ in self._of.values()}
        held = dict.fromkeys(keys, 0)
        sizes: dict[str, int] = {}
        described: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {
            key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}
            for key, stored in self.metadata.state_dict_metadata.items()
            if key in keys and isinstance(stored, dcp.TensorStorageMetadata)
        }
        assert self.metadata.storage_data is not None
        for index, info in self.metadata.storage_data.items():
            key = index.fqn
            if key not in keys:
                continue
            self._check_file(key, info, sizes)
            offsets = list(index.offset or ())
            shape = described[key].get(tuple(offsets))
            if shape is None:
                raise CheckpointError(f"{self.folder}: key {key} has an item that its metadata does not describe")
            held[key] += math.prod(shape)
            first, count = None, 1
            if experts[key]:
                first, count = offsets[0], shape[0]
                offsets, shape = offsets[1:], shape[1:]
            row, rows = offsets[0], shape[0]
            column, width = (offsets[1], shape[1]) if len(shape) > 1 else (0, 1)
            for number in range(count):
                leading = None if first is None else first + number
                piece = _Chunk(row, rows, column, width, number * rows, info)
                self._chunks.setdefault((key, leading), []).append(piece)
        for key, numbers in held.items():
            stored = self.metadata.state_dict_metadata[key]
            if not isinstance(stored, dcp.TensorStorageMetadata) or numbers != math.prod(stored.size):
                raise CheckpointError(f"{self.folder}: key {key} is not there as a whole; the checkpoint is incomplete")

    def _check_file(self, key: str, info: _StorageInfo, sizes: dict[str, int]) -> None:
        if info.transform_descriptors:
            raise CheckpointError(f"{self.folder}: key {key} is stored as {info.transform_descriptors}; not supported")
        if info.relative_path not in sizes:
            path = self.folder / info.relative_path
            if not path.is_file():
                raise CheckpointError(f"{path}: does not exist, though the metadata names it for key {key}")
            sizes[info.relative_path] = path.stat().st_size
        if info.offset + info.length > sizes[info.relative_path]:
            raise CheckpointError(f"{self.folder / info.relative_path}: truncated: key {key} would lie behind its end")

    def _read_key(self, placement: Placement, start: int, stop: int, out: memoryview, row_bytes: int) -> None:
        width = math.prod(placement.shape[1:])
        size = row_bytes // width
        for chunk in self._chunks[placement.key, placement.leading]:
            first, last = max(start, chunk.row), min(stop, chunk.row + chunk.rows)
            if first >= last:
                continue
            handle, data = self._open_item(placement.key, chunk)
            chunk_bytes = chunk.columns * size
            offset = data + (chunk.row_in_item + first - chunk.row) * chunk_bytes
            file = str(self.folder / chunk.info.relative_path)
            target = out[(first - start) * row_bytes : (last - start) * row_bytes]
            if chunk.columns == width:
                read_exactly(handle, offset, target, file)
            else:
                part = bytearray((last - first) * chunk_bytes)
                read_exactly(handle, offset, memoryview(part), file)
                rows = torch.frombuffer(target, dtype=torch.uint8).view(last - first, row_bytes)
                columns = slice(chunk.column * size, chunk.column * size + chunk_bytes)
                rows[:, columns] = torch.frombuffer(part, dtype=torch.uint8).view(last - first, chunk_bytes)
            self.bytes_read += (last - first) * chunk_bytes

    def _open_item(self, key: str, chunk: _Chunk) -> tuple[int, int]:
        """(file handle, where in the file the item's numbers start)."""
        info = chunk.info
        path = self.folder / info.relative_path
        handle = self._handles.get(info.relative_path)
        if handle is None:
            handle = self._handles[info.relative_path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        place = (info.relative_path, info.offset)
        if self._data_offset is None or self._data_offset[0] != place:
            offset = _numbers_in_item(handle, info, self._described, f"{path}: key {key}")
            self._data_offset = place, info.offset + offset
        return handle, self._data_offset[1]


def _numbers_in_item(handle: int, info: _StorageInfo, described: dict[bytes, bool], what: str) -> int:
    """Where a torch.save item's numbers start, in bytes from the item's start. They must be whole and in C order.

    `described` remembers which descriptions (the item's pickle, the same for tensors of one shape) are such.
    """
    head = os.pread(handle, min(_HEAD_BYTES, info.length), info.offset)
    records = {name: place for name, *place in _stored_records(head)}
    if "data.pkl" not in records or "data/0" not in records:
        raise CheckpointError(f"{what}: damaged, or not written by torch.save")
    description = head[slice(*records["data.pkl"])]
    if description not in described:
        window = _Window(handle, info.offset, info.length)
        try:
            with torch.serialization.skip_data():
                tensor = torch.load(cast(IO[bytes], window), weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
            raise CheckpointError(f"{what}: truncated or damaged ({str(error).splitlines()[0]})") from None
        described[description] = tensor.is_contiguous() and not tensor.storage_offset()
    if not described[description]:
        raise CheckpointError(f"{what}: stored in an order that is not supported")
    return records["data/0"][0]


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
