"""Convert a model folder to another form: in worker processes, with bounded memory, resumable, all or nothing.

A conversion is a list of tasks that do not depend on the number of workers. Each leaves a record when its bytes are on
the disk; --resume does the tasks that have none. The destination gets its name when all is there and checked. What is
read and written is the readers' and sinks' business.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_r1.config.shape import ModelShape, hf_files
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.folders import copy_side_files, open_checkpoint, open_raw, read_shape, without_fp8
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, fp8_entries
from megatron_r1.weights.hf_sink import HFSink, OutputTensor
from megatron_r1.weights.inventory import Inventory, take_inventory
from megatron_r1.weights.pieces import PieceBuffer, TaskRecord, TensorRecord
from megatron_r1.weights.placement import place
from megatron_r1.weights.reader import CheckpointReader
from megatron_r1.weights.torch_dist import MANIFEST, is_torch_dist
from megatron_r1.weights.torch_dist_sink import TorchDistSink

FP8_BLOCK = 128
"""The block of DeepSeek's format, for weights that were not FP8 before."""

Target = Literal["torch_dist", "hf"]
Precision = Literal["keep", "bf16", "fp32", "fp8"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": FP8}
_RECORDS = ".records"
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """`precision` "keep" writes what is stored (for torch_dist: FP8 becomes bf16, which every model loads)."""

    target: Target
    precision: Precision = "keep"
    workers: int = 2
    file_bytes: int = 2_000_000_000
    resume: bool = False
    allow_nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a finished conversion did. `seconds` is wall-clock time; `source_bytes` and `written_bytes` are whole."""

    tensors: int
    source_bytes: int
    written_bytes: int
    seconds: float
    skipped: tuple[str, ...]
    nonfinite: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Plan:
    sink: HFSink | TorchDistSink
    raw: bool
    shape: ModelShape
    names: tuple[str, ...]
    source_bytes: int
    dtype: torch.dtype | None
    fp8_block: int | None
    aliases: dict[str, str]
    skipped: tuple[str, ...]


def convert(
    source: Path, target: Path, options: ConvertOptions, *, progress: Callable[[int, int], None] | None = None
) -> Conversion:
    """Convert `source` (Hugging Face or torch_dist folder) to a new folder `target`.

    `progress(done, total)` is called with source bytes a few times a second. Raises CheckpointError or ConfigError
    before anything is written if the source or the destination will not do; FileExistsError if `target` is not empty.
    What an interrupted conversion left lies in `target`.partial.
    """
    started = time.monotonic()
    if options.workers < 1:
        raise CheckpointError(f"workers is {options.workers}; it must be at least 1")
    shape = read_shape(source)
    _check_target(source, target)
    partial = target.with_name(target.name + ".partial")
    plan = _plan(source, partial, shape, options)
    tasks = plan.sink.tasks()
    with _own(partial, _fingerprint(source, plan, options), resume=options.resume):
        done = _read_records(partial, len(tasks))
        _check_space(partial, plan, done)
        plan.sink.prepare()
        _run_tasks(source, partial, plan, tasks, done.keys(), options.workers, progress)
        records = _read_records(partial, len(tasks))
        if len(records) < len(tasks):
            raise CheckpointError(f"{partial}: the disk did not take all data; make room and go on with --resume")
        ordered = list(records.values())
        tensors = {name: tensor for record in ordered for name, tensor in record.tensors.items()}
        nonfinite = {name: record.nonfinite for name, record in tensors.items() if record.nonfinite}
        if nonfinite and not options.allow_nonfinite:
            raise CheckpointError(_nonfinite_message(nonfinite, source, shape))
        plan.sink.finish(ordered)
        side = partial / "hf" if options.target == "torch_dist" else partial
        copy_side_files(source, side, dtype=_config_dtype(plan, tensors), fp8_block=plan.fp8_block)
        _write_manifest(partial, plan, tensors, options)
        _check_result(source, partial, plan)
        written = sum(file.stat().st_size for file in partial.iterdir() if file.is_file())
        _publish(partial, target)
    seconds = time.monotonic() - started
    return Conversion(len(tensors), plan.source_bytes, written, seconds, plan.skipped, nonfinite)


# ---- planning


def _plan(source: Path, partial: Path, shape: ModelShape, options: ConvertOptions) -> _Plan:
    computing = open_checkpoint(source, shape)
    inventory = take_inventory(computing, shape, source)
    keep_fp8 = bool(shape.fp8_block) and (
        options.precision == "fp8" or (options.precision == "keep" and options.target == "hf")
    )
    if options.target == "torch_dist" and options.precision == "fp8" and not shape.fp8_block:
        raise CheckpointError(
            f"{source}: is not FP8; a torch_dist checkpoint keeps FP8 weights but is not quantised: quantise on export"
        )
    reader = open_raw(source, shape) if keep_fp8 else computing
    dtype = None if keep_fp8 or options.precision == "keep" else _DTYPES[options.precision]
    make = _plan_hf if options.target == "hf" else _plan_torch_dist
    sink, names = make(partial, reader, shape, inventory, dtype, keep_fp8, options)
    block = (shape.fp8_block or FP8_BLOCK) if keep_fp8 or dtype == FP8 else None
    source_bytes = sum(reader.tensors[name].num_bytes for name in names)
    reader.close()
    computing.close()
    aliases = {alias: entry.hf[0] for entry in inventory.entries for alias in inventory.aliases[entry.name]}
    return _Plan(sink, keep_fp8, shape, tuple(names), source_bytes, dtype, block, aliases, inventory.skipped)


def _plan_hf(
    partial: Path,
    reader: CheckpointReader,
    shape: ModelShape,
    inventory: Inventory,
    dtype: torch.dtype | None,
    keep_fp8: bool,
    options: ConvertOptions,
) -> tuple[HFSink, list[str]]:
    tensors = []
    for entry in inventory.entries:
        for name in (*entry.hf, *inventory.aliases[entry.name]):
            info = reader.tensors[name]
            quantised = dtype == FP8 and entry.fp8
            if entry.float32 and dtype is not None:
                target = torch.float32
            elif dtype is None:
                target = info.dtype
            else:
                target = torch.bfloat16 if dtype == FP8 and not quantised else dtype
            tensors.append(OutputTensor(name, target, info.shape, quantised))
            if keep_fp8 and name + SCALE_SUFFIX in reader.tensors:
                scales = reader.tensors[name + SCALE_SUFFIX]
                tensors.append(OutputTensor(name + SCALE_SUFFIX, scales.dtype, scales.shape))
    sink = HFSink(partial, tensors, file_bytes=options.file_bytes, fp8_block=shape.fp8_block or FP8_BLOCK)
    return sink, [tensor.name for tensor in tensors]


def _plan_torch_dist(
    partial: Path,
    reader: CheckpointReader,
    shape: ModelShape,
    inventory: Inventory,
    dtype: torch.dtype | None,
    keep_fp8: bool,
    options: ConvertOptions,
) -> tuple[TorchDistSink, list[str]]:
    entries = []
    for entry in inventory.entries:
        if keep_fp8 and reader.tensors[entry.hf[0]].dtype == FP8:
            if entry.kind == "qkv" or shape.fp8_block is None:
                raise CheckpointError(
                    f"{entry.hf[0]}: Megatron fuses query, key and value, which FP8 blocks do not survive; use bf16"
                )
            entries += fp8_entries(entry, shape.fp8_block)
        else:
            entries.append(entry)
    placements = [place(entry, shape) for entry in entries]
    dtypes: dict[str, torch.dtype] = {}
    for placement in placements:
        for name in placement.entry.hf:
            target = reader.tensors[name].dtype if dtype is None else dtype
            if placement.entry.float32 and dtype is not None:
                target = torch.float32
            if dtypes.setdefault(placement.key, target) != target:
                raise CheckpointError(
                    f"{reader.tensors[name].file}: {name} is {target} and other parts of Megatron's {placement.key} "
                    f"are {dtypes[placement.key]}; choose one precision (bf16 or fp32)"
                )
    names = [name for placement in placements for name in placement.entry.hf]
    return TorchDistSink(partial, placements, dtypes, inventory.aliases), names


# ---- the destination


def _check_target(source: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder or remove it")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: does not exist; make it first")
    if target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target}: lies inside the source {source}; choose another folder")


@contextmanager
def _own(partial: Path, fingerprint: dict[str, Any], *, resume: bool):
    """Make or take over the unfinished folder, and keep other conversions out of it."""
    plan = partial / _RECORDS / "plan.json"
    if partial.exists() and not resume:
        raise FileExistsError(
            f"{partial} was left by a conversion that did not finish; go on with --resume, or remove it"
        )
    (partial / _RECORDS).mkdir(parents=True, exist_ok=True)
    with open(partial / _RECORDS / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial}: another conversion is writing it; wait for it, or stop it") from None
        if plan.exists() and json.loads(plan.read_text()) != fingerprint:
            raise CheckpointError(
                f"{partial}: was begun from another source or with other options; repeat those, or remove it"
            )
        _write_atomically(plan, fingerprint)
        yield


def _fingerprint(source: Path, plan: _Plan, options: ConvertOptions) -> dict[str, Any]:
    """What must not change between a conversion and its resumption."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = hashlib.sha256((hf_files(source) / "config.json").read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps([state, config, plan.names]).encode()).hexdigest()
    return {"source": digest, "target": options.target, "precision": options.precision, "file": options.file_bytes}


def _check_space(partial: Path, plan: _Plan, records: dict[int, TaskRecord]) -> None:
    needed = plan.sink.total_bytes
    present = sum(file.stat().st_blocks * 512 for file in partial.iterdir() if file.is_file()) if records else 0
    free = shutil.disk_usage(partial).free
    if needed - present > free:
        raise CheckpointError(
            f"{partial.parent}: {needed:,} bytes are to be written and {free:,} are free; make room, or choose another "
            "disk"
        )


def _publish(partial: Path, target: Path) -> None:
    shutil.rmtree(partial / _RECORDS)
    for file in (*partial.rglob("*"), partial):
        _fsync(file)
    if target.exists():
        target.rmdir()
    partial.rename(target)


def _write_manifest(folder: Path, plan: _Plan, tensors: dict[str, TensorRecord], options: ConvertOptions) -> None:
    manifest = {
        "format": 1,
        "kind": options.target,
        "architecture": plan.shape.architecture,
        "hash": "blake3 of the tensor's bytes in Hugging Face's layout",
        "aliases": plan.aliases,
        "tensors": {name: asdict(record) for name, record in tensors.items()},
    }
    _write_atomically(folder / MANIFEST, manifest)


def _write_atomically(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _config_dtype(plan: _Plan, tensors: dict[str, TensorRecord]) -> torch.dtype | None:
    """The dtype that config.json names: that of most numbers, bf16 for FP8 folders (as DeepSeek's say)."""
    if plan.fp8_block is not None:
        return torch.bfloat16
    sizes: dict[str, int] = {}
    for record in tensors.values():
        sizes[record.dtype] = sizes.get(record.dtype, 0) + torch.Size(record.shape).numel()
    return getattr(torch, max(sizes, key=lambda name: sizes[name])) if sizes else None


def _check_result(source: Path, result: Path, plan: _Plan) -> None:
    """Every name, shape and dtype of the source is in the result, as the result's own files say."""
    shape = plan.shape if plan.fp8_block is not None and plan.raw else without_fp8(plan.shape)
    written = open_raw(result, shape)
    promised = json.loads((result / MANIFEST).read_text())["tensors"]
    for name, record in promised.items():
        info = written.tensors.get(name)
        dtype = None if info is None else str(info.dtype).removeprefix("torch.")
        if info is None or list(info.shape) != record["shape"] or dtype != record["dtype"]:
            raise CheckpointError(f"{result}: {name} should be {record['dtype']}{record['shape']}, found {info}")
    missing = [name for name in plan.names if name not in promised]
    if missing:
        raise CheckpointError(f"{result}: {', '.join(missing[:5])} of {source} did not arrive")
    written.close()


def _nonfinite_message(nonfinite: dict[str, int], source: Path, shape: ModelShape) -> str:
    reader = open_raw(source, shape)
    shown = [
        f"{name} ({count:,} numbers, {reader.tensors[name].file if name in reader.tensors else source})"
        for name, count in list(nonfinite.items())[:5]
    ]
    reader.close()
    more = f" and {len(nonfinite) - 5} more" if len(nonfinite) > 5 else ""
    return (
        f"{source}: NaN or infinite weights in {', '.join(shown)}{more}; "
        "if they are meant, repeat with --resume --allow-nonfinite"
    )


# ---- work


def _read_records(partial: Path, num_tasks: int) -> dict[int, TaskRecord]:
    """Finished tasks of an earlier try. A record whose data file is not there as it was does not count."""
    records = {}
    for number in range(num_tasks):
        path = partial / _RECORDS / f"{number}.json"
        if path.exists():
            record = TaskRecord.from_json(json.loads(path.read_text()))
            data = partial / record.file
            if data.is_file() and data.stat().st_size == record.size:
                records[number] = record
    return records


def _run_tasks(
    source: Path,
    partial: Path,
    plan: _Plan,
    tasks: Sequence[Sequence[Any]],
    done_before: Collection[int],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Do the tasks that have no record. The first error ends the conversion; finished tasks keep their records."""
    todo = [number for number in range(len(tasks)) if number not in done_before]
    # fork: workers share the parent's libraries in memory, and start at once. No thread runs in this process yet.
    context = multiprocessing.get_context("fork")
    counter = context.Value("Q", 0)
    before = plan.source_bytes * len(done_before) // max(len(tasks), 1)
    with ProcessPoolExecutor(
        min(workers, max(len(todo), 1)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(source, partial, plan, tasks, counter, os.getpid()),
    ) as pool:
        waiting: set[Future[None]] = {pool.submit(_run_task, number) for number in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                if progress is not None:
                    progress(min(before + counter.value, plan.source_bytes), plan.source_bytes)
        except BrokenProcessPool:
            raise CheckpointError(
                "a worker process was killed (is memory short?); what is done is kept: go on with --resume"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{partial}: {error.strerror or error}; what is done is kept: make room and go on with --resume"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(slots=True)
class _Worker:
    """What a worker process keeps between tasks."""

    partial: Path
    plan: _Plan
    tasks: Sequence[Sequence[Any]]
    reader: CheckpointReader
    buffer: PieceBuffer
    counter: Any
    parent: int
    flusher: ThreadPoolExecutor

    def report(self, num_bytes: int) -> None:
        with self.counter.get_lock():
            self.counter.value += num_bytes
        if os.getppid() != self.parent:
            os._exit(1)  # the conversion was killed: nobody will finish it


_worker: list[_Worker] = []
"""This process's worker; concurrent.futures has no other place for it."""


def _start_worker(
    source: Path, partial: Path, plan: _Plan, tasks: Sequence[Sequence[Any]], counter: Any, parent: int
) -> None:
    torch.set_num_threads(1)
    reader = (open_raw if plan.raw else open_checkpoint)(source, plan.shape)
    flusher = ThreadPoolExecutor(1)
    _worker[:] = [_Worker(partial, plan, tasks, reader, PieceBuffer(), counter, parent, flusher)]


def _run_task(number: int) -> None:
    worker = _worker[0]
    record = worker.plan.sink.run(worker.tasks[number], number, worker.reader, worker.buffer, worker.report)
    # The disk is waited for beside the next task; the process ends only when its threads have.
    worker.flusher.submit(_keep, worker.partial, number, record)


def _keep(partial: Path, number: int, record: TaskRecord) -> None:
    """The record is written when the data is on the disk: a resumed conversion may trust it, after a power cut too."""
    _fsync(partial / record.file)
    _write_atomically(partial / _RECORDS / f"{number}.json", asdict(record))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def kind_of(folder: Path) -> Target:
    return "torch_dist" if is_torch_dist(folder) else "hf"
