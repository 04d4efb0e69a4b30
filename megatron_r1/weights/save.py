"""Write the model as a Hugging Face folder from the ranks that hold it: each file by one rank, nothing gathered.

Files are laid out first (hf_sink.py). A file belongs to a rank that holds much of it; the others send it the rest,
shard to shard (resharding/), and it puts every piece at its place in the file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.agreement import together
from megatron_r1.config.model_folder import without_mtp
from megatron_r1.errors import CheckpointError
from megatron_r1.resharding.boxes import Box, parts, whole
from megatron_r1.resharding.plan import Piece, Shard, Want, make_plan
from megatron_r1.weights.export import WeightStream
from megatron_r1.weights.hf_sink import HFSink, OutputTensor
from megatron_r1.weights.wire import exchange, wire_tensors

FILE_BYTES = 4 << 30
SMALLEST_FILE_BYTES = 64 << 20
"""Several ranks write several files, but none smaller than this for it."""

_NOT_COPIED = ("model", "pytorch_model", "megatron_r1", "config.json")
_PROGRAMS_AND_WEIGHTS = (".py", ".safetensors", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".gguf")


def save_hf_folder(
    stream: WeightStream,
    source: Path,
    target: Path,
    *,
    file_bytes: int = FILE_BYTES,
    extra: Mapping[str, object] | None = None,
    config_changes: Mapping[str, object] | None = None,
) -> None:
    """Write the weights as a Hugging Face folder that transformers and vLLM load as it is. Collective over all ranks.

    Everything but weights and programs (config.json, tokenizer, chat template, generation config) is copied from
    `source`; config.json loses auto_map, and its MTP layers if the stream has none. The folder appears under its name
    only when it is whole: it is written beside it and renamed. `extra` goes to megatron_r1.json inside the folder
    (step, lineage); `config_changes` replace fields of config.json. On every rank: FileExistsError if the target exists
    and is not empty, CheckpointError if it cannot be written (then nothing is left of it).
    """
    partial = target.with_name(target.name + ".partial")
    first = dist.get_rank() == 0
    together(lambda: _make_room(target, partial) if first else None)
    try:
        _write_weights(stream, partial, file_bytes)
        together(lambda: _write_rest(stream, source, partial, extra or {}, config_changes or {}) if first else None)
        together(lambda: _appear(partial, target) if first else None)
    except BaseException as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            remedy = "make room, or choose another disk"
            raise CheckpointError(f"{target}: cannot be written: {error}; {remedy}") from error
        raise


def _make_room(target: Path, partial: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder or remove it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_weights(stream: WeightStream, partial: Path, file_bytes: int) -> None:
    rank = dist.get_rank()
    files = _Files(stream, partial, file_bytes)
    tensors, shards = wire_tensors(files.specs), stream.shards
    together(lambda: files.prepare(rank))
    wants: list[list[Want]] = [[] for _ in range(dist.get_world_size())]
    own: list[tuple[int, Box]] = []
    for tensor, box, ranks in shards:
        writer = files.writer(tensor)
        if writer not in ranks:
            wants[writer].append(Want(tensor, box))
        elif writer == rank:
            own.append((tensor, box))

    def write_own() -> None:
        for tensor, box in own:
            for part in parts(box, stream.bucket_bytes // tensors[tensor].itemsize):
                files.take(Piece(0, tensor, part), stream.read(tensor, part))

    def fill(piece: Piece, place: torch.Tensor) -> None:
        place.copy_(stream.read(piece.tensor, piece.box))

    plan = make_plan(tensors, shards, [wants], stream.bucket_bytes)
    exchange(plan, files.specs, tensors, stream.device, fill, files.take, write_own)
    together(lambda: files.sink.finish(()) if rank == 0 else None)


class _Files:
    """The folder's files: where each tensor lies, who writes it, and, on a writer, the file's bytes in memory."""

    def __init__(self, stream: WeightStream, folder: Path, file_bytes: int) -> None:
        self.specs = stream.metadata()
        outputs = [OutputTensor(name, dtype, shape) for name, dtype, shape in self.specs]
        each = -(-sum(output.num_bytes for output in outputs) // dist.get_world_size())
        limit = min(file_bytes, max(each, SMALLEST_FILE_BYTES))
        self.folder, self.sink = folder, HFSink(folder, outputs, file_bytes=limit, fp8_block=1, power_of_two=False)
        self.places = [self.sink.place(output.name) for output in outputs]
        files = [file for file, _ in self.places]
        self.writers = choose_writers(files, [output.num_bytes for output in outputs], stream.shards)
        self.bytes: dict[str, torch.Tensor] = {}

    def writer(self, tensor: int) -> int:
        return self.writers[self.places[tensor][0]]

    def prepare(self, rank: int) -> None:
        """Reserve this rank's files on the disk, and map them. OSError if there is no room."""
        for file in (file for file, writer in self.writers.items() if writer == rank):
            self.sink.prepare(file)
            path = self.folder / file
            self.bytes[file] = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)

    def take(self, piece: Piece, values: torch.Tensor) -> None:
        """Put a piece's numbers, [rows, columns], at their place in its file."""
        (_, dtype, shape), (file, begin) = self.specs[piece.tensor], self.places[piece.tensor]
        full, (top, bottom, left, right), size = whole(shape), piece.box, dtype.itemsize
        # As bytes: a tensor of the file may begin anywhere.
        rows = self.bytes[file][begin : begin + full.size * size].view(full.rows, full.columns * size)
        data = values.to(dtype).contiguous().view(torch.uint8).view(piece.box.rows, -1)
        rows[top:bottom, left * size : right * size].copy_(data)


def choose_writers(files: Sequence[str], sizes: Sequence[int], shards: Sequence[Shard]) -> dict[str, int]:
    """The rank that writes each file: of those that hold most of it, the one that writes least. `files` and `sizes`
    (bytes) are by tensor. The same on every rank."""
    held: dict[str, Counter[int]] = {}
    numbers: dict[str, int] = {}
    for file, size in zip(files, sizes, strict=True):
        numbers[file] = numbers.get(file, 0) + size
    for tensor, box, ranks in shards:
        for rank in ranks:
            held.setdefault(files[tensor], Counter())[rank] += box.size
    writes: Counter[int] = Counter()
    chosen = {}
    for file, size in numbers.items():
        most = max(held[file].values())
        able = [rank for rank, count in held[file].items() if count > 0.9 * most]
        chosen[file] = min(able, key=lambda rank: (writes[rank], rank))
        writes[chosen[file]] += size
    return chosen


def _write_rest(
    stream: WeightStream,
    source: Path,
    partial: Path,
    extra: Mapping[str, object],
    config_changes: Mapping[str, object],
) -> None:
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(_NOT_COPIED) and file.suffix not in _PROGRAMS_AND_WEIGHTS:
            shutil.copy2(file, partial / file.name)
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fields.pop("auto_map", None)  # names programs, which are left behind
    fields = fields if stream.has_mtp else without_mtp(fields)
    _write_json(partial / "config.json", fields | dict(config_changes))
    _write_json(partial / "megatron_r1.json", dict(extra))


def _appear(partial: Path, target: Path) -> None:
    if target.exists():
        target.rmdir()
    os.rename(partial, target)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
