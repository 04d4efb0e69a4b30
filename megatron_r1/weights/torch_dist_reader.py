"""Read Megatron's torch_dist checkpoints, any that Megatron saved, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.files import OpenFiles
from megatron_r1.weights.fp8 import fp8_entries
from megatron_r1.weights.inventory import known_aliases
from megatron_r1.weights.manifest import MANIFEST, read_manifest
from megatron_r1.weights.placement import Placement, place
from megatron_r1.weights.reader import TensorInfo, byte_view, read_exactly
from megatron_r1.weights.table import Entry, build_table
from megatron_r1.weights.torch_dist_item import ItemReader
from megatron_r1.weights.torch_dist_metadata import StoredItem, StoredTensor, read_metadata


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [row, row + rows) and columns [column, column + columns) of a key (of one expert), stored as an item whose
    own row `row_in_item` is the first of them."""

    row: int
    rows: int
    column: int
    columns: int
    row_in_item: int
    item: StoredItem


class TorchDistFolder:
    """A CheckpointReader of a torch_dist checkpoint, under the Hugging Face names of `shape`'s table.

    Keys that the table does not know (optimizer, random states, extra states) are not read. MTP layers that the
    checkpoint lacks are absent. Raises CheckpointError for a key that is missing or has another shape.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self.folder = folder
        self._folder_name = str(folder)
        self.bytes_read = 0
        self.metadata = read_metadata(folder)
        self._files = OpenFiles()
        self._numbers: tuple[StoredItem, int] | None = None
        self._items = ItemReader()
        self._chunks: dict[tuple[str, int | None], list[_Chunk]] = {}
        self._of: dict[str, tuple[Placement, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        stored = self.metadata.keys
        table = build_table(shape)
        for entry in table:
            placed = [place(entry, shape)]
            if entry.fp8 and shape.fp8_block and entry.kind != "qkv" and placed[0].key not in stored:
                placed = [place(half, shape) for half in fp8_entries(entry, shape.fp8_block)]
            for placement in placed:
                if placement.key in stored:
                    self._add(placement, stored[placement.key])
                elif not entry.name.startswith("mtp."):
                    raise CheckpointError(f"{folder}: key {placement.key} is missing; it is of another model")
        self._add_aliases(shape, table)
        self._index_chunks()

    def close(self) -> None:
        self._files.close()

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

    def _add(self, placement: Placement, stored: StoredTensor | None) -> None:
        expected = placement.global_shape
        size = stored.size if stored is not None else None
        padded = placement.entry.kind == "vocabulary" and size is not None and size[0] >= expected[0]
        if stored is None or size is None or (size != expected and not (padded and size[1:] == expected[1:])):
            found = f"has shape {list(size)}" if size is not None else "is not a tensor"
            raise CheckpointError(f"{self.folder}: key {placement.key} {found}, config.json implies {list(expected)}")
        for part, name in enumerate(placement.entry.hf):
            self.tensors[name] = TensorInfo(stored.dtype, placement.entry.hf_shapes[part], str(self.folder))
            self._of[name] = placement, part

    def _add_aliases(self, shape: ModelShape, table: Iterable[Entry]) -> None:
        """The names under which the converted folder repeated a tensor; for other checkpoints, the table's own."""
        manifest = read_manifest(self.folder)
        known = {alias: entry.hf[0] for entry in table for alias in known_aliases(entry, shape)}
        if manifest is not None:
            aliases = manifest.aliases
            for alias, name in aliases.items():
                if known.get(alias) != name:
                    raise CheckpointError(
                        f"{self.folder / MANIFEST}: calls {alias} a copy of {name}, which it is not in a "
                        f"{shape.architecture} model with this config.json; remove the manifest, or fetch it again"
                    )
        else:
            with_mtp = any(key.startswith("mtp.") for key in self.metadata.keys)
            aliases = {alias: name for alias, name in known.items() if with_mtp and alias != "lm_head.weight"}
        for alias, name in aliases.items():
            if name in self._of:
                self.tensors[alias], self._of[alias] = self.tensors[name], self._of[name]

    def _index_chunks(self) -> None:
        """Which item holds which rows. Together the items of a key must be the key: no number twice, none missing."""
        experts = {placement.key: placement.leading is not None for placement, _ in self._of.values()}
        held = dict.fromkeys(experts, 0)
        sizes: dict[str, int] = {}
        for item in self.metadata.items:
            stored = self.metadata.keys.get(item.key)
            if item.key not in experts or stored is None:
                continue
            self._check_file(item, sizes)
            shape = stored.chunks.get(item.offsets)
            if shape is None:
                raise CheckpointError(f"{self.folder}: key {item.key} has an item that its metadata does not describe")
            held[item.key] += math.prod(shape)
            for leading, chunk in _chunks(item, shape, experts[item.key]):
                self._chunks.setdefault((item.key, leading), []).append(chunk)
        for (key, _), chunks in self._chunks.items():
            if _overlap(chunks):
                raise CheckpointError(f"{self.folder}: key {key} has items that overlap; the checkpoint is damaged")
        for key, numbers in held.items():
            stored = self.metadata.keys[key]
            if stored is None or numbers != math.prod(stored.size):
                raise CheckpointError(f"{self.folder}: key {key} is not there as a whole; the checkpoint is incomplete")

    def _check_file(self, item: StoredItem, sizes: dict[str, int]) -> None:
        if item.transforms:
            raise CheckpointError(f"{self.folder}: key {item.key} is stored as {item.transforms}; not supported")
        if item.file not in sizes:
            path = self.folder / item.file
            if not path.is_file():
                raise CheckpointError(f"{path}: does not exist, though the metadata names it for key {item.key}")
            sizes[item.file] = path.stat().st_size
        if item.position + item.length > sizes[item.file]:
            raise CheckpointError(f"{self.folder / item.file}: truncated: key {item.key} would lie behind its end")

    def _read_key(self, placement: Placement, start: int, stop: int, out: memoryview, row_bytes: int) -> None:
        width = math.prod(placement.shape[1:])
        size = row_bytes // width
        for chunk in self._chunks[placement.key, placement.leading]:
            first, last = max(start, chunk.row), min(stop, chunk.row + chunk.rows)
            if first >= last:
                continue
            handle, data, file = self._open_item(chunk.item)
            chunk_bytes = chunk.columns * size
            offset = data + (chunk.row_in_item + first - chunk.row) * chunk_bytes
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

    def _open_item(self, item: StoredItem) -> tuple[int, int, str]:
        """(file handle, where in the file the item's numbers start, the file's path)."""
        path = f"{self._folder_name}/{item.file}"  # not a Path, which is slow to make: this runs for every piece
        handle = self._files.handle(path)
        if self._numbers is None or self._numbers[0] is not item:
            stored = self.metadata.keys[item.key]
            assert stored is not None, item.key
            start = self._items.start_of_numbers(
                handle, item.position, item.length, stored.dtype, stored.chunks[item.offsets], f"{path}: key {item.key}"
            )
            self._numbers = item, start
        return handle, self._numbers[1], path


def _chunks(item: StoredItem, shape: tuple[int, ...], of_experts: bool) -> Iterable[tuple[int | None, _Chunk]]:
    """(expert or None, the rows and columns of it that an item of `shape` holds)."""
    offsets, first, count = item.offsets, None, 1
    if of_experts:
        first, count = offsets[0], shape[0]
        offsets, shape = offsets[1:], shape[1:]
    row, rows = offsets[0], shape[0]
    column, width = (offsets[1], shape[1]) if len(shape) > 1 else (0, 1)
    for number in range(count):
        leading = None if first is None else first + number
        yield leading, _Chunk(row, rows, column, width, number * rows, item)


def _overlap(chunks: list[_Chunk]) -> bool:
    """Whether two chunks of one matrix share a number."""
    open_ones: list[_Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.row):
        open_ones = [other for other in open_ones if other.row + other.rows > chunk.row]
        for other in open_ones:
            if other.column < chunk.column + chunk.columns and chunk.column < other.column + other.columns:
                return True
        if chunk.rows and chunk.columns:
            open_ones.append(chunk)
    return False
