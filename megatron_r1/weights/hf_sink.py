"""Write a Hugging Face folder of safetensors, each tensor a piece at a time at its final place.

All shapes and dtypes are known before, so the files' headers are written first, and worker processes fill in the
tensors in any order. Nothing here knows where the weights come from.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.weights.files import reserve
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, quantise, scale_shape
from megatron_r1.weights.hf_folder import DTYPES, INDEX, SINGLE
from megatron_r1.weights.pieces import PieceBuffer, TaskRecord, TensorDigest, TensorRecord, row_ranges, runs, task_bytes
from megatron_r1.weights.reader import CheckpointReader, byte_view
from megatron_r1.weights.writer import FileWriter, WriteBuffers, write_all

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to write. `quantised` asks for FP8 with scales, which are written under their own name with it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    quantised: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HFSink:
    """Plans the files of at most `file_bytes` each (a larger tensor has a file of its own)."""

    def __init__(
        self, folder: Path, tensors: Sequence[OutputTensor], *, file_bytes: int, fp8_block: int, power_of_two: bool
    ) -> None:
        self.folder, self._block, self._tensors = folder, fp8_block, tuple(tensors)
        self._power_of_two = power_of_two
        groups = [self._with_scales(tensor) for tensor in tensors]
        files = runs(groups, lambda group: sum(part.num_bytes for part in group), file_bytes) or [[]]
        self._places: dict[str, tuple[str, int]] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        for number, held in enumerate(files, start=1):
            file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            self._plan_file(file, [tensor for group in held for tensor in group])

    @property
    def total_bytes(self) -> int:
        return sum(self._sizes.values())

    def prepare(self, *files: str) -> None:
        """Write the headers of `files` (none: all) and reserve the tensors' place on the disk. What is there stays."""
        for file in files or self._headers:
            handle = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                reserve(handle, self._sizes[file])
                write_all(handle, 0, memoryview(self._headers[file]))
            finally:
                os.close(handle)

    def place(self, name: str) -> tuple[str, int]:
        """A tensor's file, and its first byte there."""
        return self._places[name]

    def files(self) -> set[str]:
        """The names of all files that a finished conversion has from here."""
        return {*self._headers, INDEX} if len(self._headers) > 1 else set(self._headers)

    def tasks(self) -> list[list[OutputTensor]]:
        """Runs of neighbours in one file, of about task_bytes each: what one worker writes at a time.

        They go from file to file, because two processes that write to one file wait for each other.
        """
        held: dict[str, list[OutputTensor]] = {file: [] for file in self._headers}
        for tensor in self._tensors:
            held[self._places[tensor.name][0]].append(tensor)
        limit = task_bytes(self.total_bytes)
        of_files = [runs(tensors, lambda tensor: tensor.num_bytes, limit) for tensors in held.values()]
        return [run for round in itertools.zip_longest(*of_files) for run in round if run is not None]

    def run(
        self,
        task: Sequence[OutputTensor],
        number: int,
        reader: CheckpointReader,
        buffer: PieceBuffer,
        writes: WriteBuffers,
        report: Callable[[int], None],
    ) -> tuple[TaskRecord, int]:
        """Copy a task's tensors; `report(source bytes)` is called after each piece. Returns what is now to be synced:
        the record, and the open descriptor that wrote, which alone hears of every write of this task that is lost.
        """
        record = TaskRecord(file=self._places[task[0].name][0])
        record.size = self._sizes[record.file]
        with FileWriter(self.folder / record.file, writes) as file:
            for tensor in task:
                write = self._write_quantised if tensor.quantised else self._write_plain
                record.tensors |= write(reader, tensor, file, buffer, report)
        return record, file.handle

    def finish(self, records: Sequence[TaskRecord]) -> None:
        if len(self._headers) > 1:
            weight_map = {name: file for name, (file, _) in self._places.items()}
            total = self.total_bytes - sum(len(header) for header in self._headers.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _with_scales(self, tensor: OutputTensor) -> list[OutputTensor]:
        if not tensor.quantised:
            return [tensor]
        shape = scale_shape(tensor.shape[0], tensor.shape[1], self._block)
        return [tensor, OutputTensor(tensor.name + SCALE_SUFFIX, torch.float32, shape)]

    def _plan_file(self, file: str, tensors: Sequence[OutputTensor]) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            end = position + tensor.num_bytes
            dtype = NAMES[tensor.dtype]
            entries[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        position = len(header)
        for tensor in tensors:
            self._places[tensor.name] = file, position
            position += tensor.num_bytes
        self._headers[file] = header
        self._sizes[file] = position

    def _write_plain(
        self, reader: CheckpointReader, tensor: OutputTensor, file: FileWriter, buffer: PieceBuffer, report
    ) -> dict[str, TensorRecord]:
        source, offset = reader.tensors[tensor.name], self._places[tensor.name][1]
        digest = TensorDigest(tensor.dtype, tensor.shape)
        for start, stop in row_ranges(source.num_rows, source.row_bytes):
            piece = buffer.read(reader, tensor.name, start, stop).to(tensor.dtype)
            data = byte_view(piece)
            digest.add(data)
            digest.count_nonfinite(piece)
            offset += file.write(offset, data)
            report((stop - start) * source.row_bytes)
        return {tensor.name: digest.record()}

    def _write_quantised(
        self, reader: CheckpointReader, tensor: OutputTensor, file: FileWriter, buffer: PieceBuffer, report
    ) -> dict[str, TensorRecord]:
        source, offset = reader.tensors[tensor.name], self._places[tensor.name][1]
        name = tensor.name + SCALE_SUFFIX
        scale_offset = self._places[name][1]
        codes_digest = TensorDigest(FP8, tensor.shape)
        scales_digest = TensorDigest(torch.float32, scale_shape(tensor.shape[0], tensor.shape[1], self._block))
        for start, stop in row_ranges(source.num_rows, source.row_bytes, self._block):
            piece = buffer.read(reader, tensor.name, start, stop)
            codes, scales = quantise(piece, block=self._block, power_of_two=self._power_of_two)
            codes_digest.count_nonfinite(piece)
            codes_digest.add(byte_view(codes))
            scales_digest.add(byte_view(scales))
            offset += file.write(offset, byte_view(codes))
            scale_offset += file.write(scale_offset, byte_view(scales))
            report((stop - start) * source.row_bytes)
        return {tensor.name: codes_digest.record(), name: scales_digest.record()}
