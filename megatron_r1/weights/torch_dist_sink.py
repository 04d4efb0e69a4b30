"""Write a torch_dist checkpoint from Hugging Face tensors, each a piece at a time, and say what was written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_r1.errors import CheckpointError
from megatron_r1.weights.pieces import PieceBuffer, TaskRecord, TensorDigest, TensorRecord, row_ranges, runs, task_bytes
from megatron_r1.weights.placement import Placement
from megatron_r1.weights.reader import CheckpointReader, byte_view, read_tensor, tensor_view
from megatron_r1.weights.torch_dist import FILES, ChunkRecord, DataFile, write_metadata
from megatron_r1.weights.writer import FileWriter, WriteBuffers

CHUNK_BYTES = 64 << 20
"""Largest item of a data file. A rank that loads a part of it reads it as a whole."""


class TorchDistSink:
    """A task is a data file: consecutive entries, about task_bytes of them.

    `dtypes` gives each Megatron key's dtype; `aliases` (by entry name) names tensors that must equal the entry's first.
    """

    def __init__(
        self,
        folder: Path,
        placements: Sequence[Placement],
        dtypes: Mapping[str, torch.dtype],
        aliases: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.folder, self._dtypes, self._aliases = folder, dtypes, aliases
        self._placements = tuple(placements)

    @property
    def total_bytes(self) -> int:
        return sum(self._bytes(placement) for placement in self._placements)

    def prepare(self) -> None:
        pass

    def files(self) -> set[str]:
        """The names of all files that a finished conversion has from here."""
        return {*FILES, *(_data_file(number) for number in range(len(self.tasks())))}

    def tasks(self) -> list[list[Placement]]:
        return runs(self._placements, self._bytes, task_bytes(self.total_bytes))

    def run(
        self,
        task: Sequence[Placement],
        number: int,
        reader: CheckpointReader,
        buffer: PieceBuffer,
        writes: WriteBuffers,
        report: Callable[[int], None],
    ) -> tuple[TaskRecord, int]:
        """Copy a task's entries; `report(source bytes)` is called after each piece. Returns as HFSink.run does."""
        record = TaskRecord(file=_data_file(number))
        with FileWriter(self.folder / record.file, writes, create=True) as file:
            data = DataFile(file, record.file, sum(map(self._bytes, task)))
            for placement in task:
                self._write(placement, reader, data, record, buffer, report)
                self._check_aliases(placement, reader, record.tensors[placement.entry.hf[0]], buffer)
        record.size = data.size
        return record, file.handle

    def finish(self, records: Sequence[TaskRecord]) -> None:
        chunks = (ChunkRecord.from_json(chunk) for record in records for chunk in record.chunks)
        write_metadata(self.folder, chunks)

    def _write(self, placement: Placement, reader, data: DataFile, record: TaskRecord, buffer, report) -> None:
        names, dtype = placement.entry.hf, self._dtypes[placement.key]
        digests = [TensorDigest(dtype, full) for full in placement.entry.hf_shapes]
        columns = placement.shape[1:]
        row_bytes = torch.Size(columns).numel() * dtype.itemsize
        leading = () if placement.leading is None else (placement.leading,)
        # Gate and up projections are chunks of their own: Megatron's shards of them are not neighbours.
        parts = [(0, placement.shape[0], placement.unit)]
        if placement.entry.kind == "gated":
            parts = [(segment.row, segment.rows, 1) for segment in placement.segments]
        for first, rows, unit in parts:
            for start, stop in row_ranges(rows, row_bytes, unit, limit=CHUNK_BYTES):
                start, stop = first + start, first + stop
                numbers = self._numbers(placement, start, stop, unit, reader, digests, buffer, report)
                offsets = (*leading, start, *(0 for _ in columns))
                sizes = (*(1 for _ in leading), stop - start, *columns)
                chunk = data.add(placement.key, dtype, placement.global_shape, offsets, sizes, numbers)
                record.chunks.append({field: getattr(chunk, field) for field in ChunkRecord.__slots__})
        record.tensors |= {name: digest.record() for name, digest in zip(names, digests, strict=True)}

    def _numbers(
        self, placement: Placement, start: int, stop: int, unit: int, reader, digests, buffer: PieceBuffer, report
    ) -> Iterator[memoryview]:
        """Rows [start, stop) of Megatron's tensor, in slices that are gathered from the Hugging Face tensors."""
        names, dtype, columns = placement.entry.hf, self._dtypes[placement.key], placement.shape[1:]
        row_bytes = torch.Size(columns).numel() * dtype.itemsize
        for low, high in row_ranges(stop - start, row_bytes, unit):
            low, high = start + low, start + high
            target = buffer.take((high - low) * row_bytes)
            for segment in placement.segments:
                first, last = max(low, segment.row), min(high, segment.row + segment.rows)
                if first >= last:
                    continue
                view = target[(first - low) * row_bytes : (last - low) * row_bytes]
                hf_row = segment.hf_row + first - segment.row
                read = _read_as(reader, names[segment.part], hf_row, hf_row + last - first, dtype, view)
                digests[segment.part].add(view)
                digests[segment.part].count_nonfinite(tensor_view(view, dtype, (last - first, *columns)))
                report(read)
            yield target

    def _check_aliases(self, placement: Placement, reader, written: TensorRecord, buffer: PieceBuffer) -> None:
        """Megatron shares one embedding and one head among all layers, so a copy that differs (in the dtype that is
        written) would be lost."""
        name, dtype = placement.entry.hf[0], self._dtypes[placement.key]
        for alias in self._aliases.get(placement.entry.name, ()):
            other = reader.tensors[alias]
            digest = TensorDigest(dtype, other.shape)
            for start, stop in row_ranges(other.num_rows, other.row_bytes):
                view = buffer.take((stop - start) * math.prod(other.shape[1:]) * dtype.itemsize)
                _read_as(reader, alias, start, stop, dtype, view)
                digest.add(view)
            if digest.record().xxh3_128 != written.xxh3_128:
                raise CheckpointError(f"{other.file}: {alias} differs from {name}; Megatron has one tensor for both")

    def _bytes(self, placement: Placement) -> int:
        return torch.Size(placement.shape).numel() * self._dtypes[placement.key].itemsize


def _data_file(task: int) -> str:
    return f"__{task}_0.distcp"


def _read_as(reader: CheckpointReader, name: str, start: int, stop: int, dtype: torch.dtype, out: memoryview) -> int:
    """Rows of a tensor as `dtype` into `out`. Returns how many bytes the reader gave."""
    info = reader.tensors[name]
    if info.dtype == dtype:
        reader.read_rows(name, start, stop, out)
    else:
        piece = read_tensor(reader, name, start, stop).to(dtype)
        out[:] = byte_view(piece)
    return (stop - start) * info.row_bytes
