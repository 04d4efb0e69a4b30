"""Write Megatron's torch_dist checkpoints a piece at a time.

The format is torch.distributed.checkpoint's: `.metadata` (pickled dataclasses: which chunk of which tensor lies where),
data files of consecutive items, each written by torch.save. Megatron's own dist_checkpointing loads what is written
here, under any layout. It needs every tensor of a rank in memory, which a conversion does not have: so the pieces are
written here, with torch's classes and in torch.save's form. Reading is torch_dist_reader.py.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_r1.weights.files import reserve
from megatron_r1.weights.torch_dist_item import item_frame
from megatron_r1.weights.torch_dist_metadata import METADATA
from megatron_r1.weights.writer import FileWriter

CONTENT = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""Megatron's content metadata: each layer has keys of its own, the experts of a layer share one key."""

_COMMON = "common.pt"
_FORMAT_FILE = "metadata.json"
FILES = (METADATA, _COMMON, _FORMAT_FILE)
"""What write_metadata writes."""

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}


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
    """A data file that is being written: items follow one another.

    `num_bytes`: what the numbers of all its items will take, which is reserved on the disk.
    """

    def __init__(self, file: FileWriter, name: str, num_bytes: int) -> None:
        self._file, self._name, self.size = file, name, 0
        if num_bytes:
            reserve(file.handle, num_bytes)

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
        position = self.size
        before, after = item_frame(dtype, sizes)
        self._write(memoryview(before))
        for part in numbers:
            self._write(part)
        self._write(memoryview(after))
        length = self.size - position
        expected = len(before) + math.prod(sizes) * dtype.itemsize + len(after)
        assert length == expected, f"{key}: {length} bytes written, {expected} expected"
        name = str(dtype).removeprefix("torch.")
        return ChunkRecord(key, name, global_shape, offsets, sizes, self._name, position, length)

    def _write(self, part: memoryview) -> None:
        self.size += self._file.write(self.size, part)


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
    torch.save({"content_metadata": CONTENT}, folder / _COMMON)
    (folder / _FORMAT_FILE).write_text(json.dumps(_FORMAT | {"common_backend_version": 1}))
    metadata = dcp.Metadata(state_dict_metadata=dict(tensors), storage_data=storage)
    with open(folder / METADATA, "wb") as file:
        pickle.dump(metadata, file)
