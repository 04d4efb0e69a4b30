"""Convert a model folder to another form: in worker processes, with bounded memory, resumable, all or nothing.

A conversion is a list of tasks that do not depend on the number of workers. Each leaves a record when its bytes are on
the disk; --resume does the tasks that have none. The destination gets its name when all is there and checked. What is
read and written is the readers' and sinks' business, who may write where is partial.py's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config.shape import hf_files
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.folders import copy_side_files, open_raw, read_shape, side_files, without_fp8
from megatron_r1.weights.manifest import MANIFEST, Manifest, check_hashes, manifest_json, read_manifest
from megatron_r1.weights.partial import Unfinished, check_space, check_target, own, partial_of
from megatron_r1.weights.pieces import TaskRecord, TensorRecord
from megatron_r1.weights.plan import ConvertOptions, Plan, make_plan
from megatron_r1.weights.process import imports_kept
from megatron_r1.weights.reader import CheckpointReader
from megatron_r1.weights.work import run_tasks

_OVERHEAD_BYTES = 4096
"""More than headers, records, manifest and index need for one tensor."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a finished conversion did. `seconds` is wall-clock time; `source_bytes` and `written_bytes` are whole."""

    tensors: int
    source_bytes: int
    written_bytes: int
    seconds: float
    skipped: tuple[str, ...]
    nonfinite: dict[str, int]


@imports_kept()
def convert(
    source: Path, target: Path, options: ConvertOptions, *, progress: Callable[[int, int], None] | None = None
) -> Conversion:
    """Convert `source` (Hugging Face or torch_dist folder) to a new folder `target`.

    `progress(done, total)` is called with source bytes a few times a second. Raises CheckpointError or ConfigError
    before anything is written if the source or the destination will not do; FileExistsError if `target` is not empty.
    What an interrupted conversion left lies in `target`.partial.
    """
    started = time.monotonic()
    for name, value in (("workers", options.workers), ("file_bytes", options.file_bytes)):
        if value < 1:
            raise CheckpointError(f"{name} is {value}; it must be at least 1")
    shape = read_shape(source)
    target = check_target(source, target)
    with make_plan(source, partial_of(target), shape, options) as plan:
        promised = read_manifest(source)
        side = side_files(source)
        side_bytes = sum(file.stat().st_size for file in side.values())
        needed = plan.sink.total_bytes + side_bytes + _OVERHEAD_BYTES * (len(plan.names) + 256)
        check_space(target, needed, resume=options.resume)
        fingerprint = _fingerprint(source, plan, options, side)
        with own(target, fingerprint, resume=options.resume, sync=options.sync) as unfinished:
            records = _do_tasks(unfinished, plan, options, progress)
            tensors = {name: tensor for record in records for name, tensor in record.tensors.items()}
            if promised is not None:
                check_hashes(promised, tensors, source, unfinished.folder)
            nonfinite = {name: record.nonfinite for name, record in tensors.items() if record.nonfinite}
            if nonfinite and not options.allow_nonfinite:
                raise CheckpointError(_nonfinite_message(nonfinite, source, plan.reader, unfinished.folder))
            plan.sink.finish(records)
            own_files = _write_rest(source, unfinished, plan, tensors, options, side)
            _check_result(unfinished.folder, plan, tensors)
            written = sum((unfinished.folder / file).stat().st_size for file in own_files)
            unfinished.publish(own_files)
    seconds = time.monotonic() - started
    return Conversion(len(tensors), plan.source_bytes, written, seconds, plan.skipped, nonfinite)


def _do_tasks(
    unfinished: Unfinished,
    plan: Plan,
    options: ConvertOptions,
    progress: Callable[[int, int], None] | None,
) -> list[TaskRecord]:
    """The records of all tasks, done now or by an earlier try."""
    tasks = plan.sink.tasks()
    done = unfinished.records(len(tasks))
    unfinished.keep_only(done)
    plan.sink.prepare()
    run_tasks(unfinished, plan, tasks, done.keys(), options.workers, progress)
    records = unfinished.records(len(tasks))
    if len(records) < len(tasks):
        raise CheckpointError(
            f"{unfinished.folder}: the disk did not take all data; make room and repeat the command with --resume"
        )
    return list(records.values())


def _write_rest(
    source: Path,
    unfinished: Unfinished,
    plan: Plan,
    tensors: dict[str, TensorRecord],
    options: ConvertOptions,
    side: dict[str, Path],
) -> set[str]:
    """Write what is no tensor. Returns the names of all files that the folder now should have."""
    folder = unfinished.folder
    inner = "hf/" if options.target == "torch_dist" else ""
    copy_side_files(
        source,
        folder / inner,
        side,
        dtype=_config_dtype(plan, tensors),
        fp8_block=plan.fp8_block,
        power_of_two=plan.power_of_two,
        mtp=plan.mtp,
    )
    manifest = manifest_json(Manifest(plan.aliases, tensors), kind=options.target, architecture=plan.shape.architecture)
    unfinished.write_json(folder / MANIFEST, manifest)
    return {MANIFEST, *plan.sink.files(), *(inner + name for name in ("config.json", *side))}


def _fingerprint(source: Path, plan: Plan, options: ConvertOptions, side: dict[str, Path]) -> dict[str, Any]:
    """What must not change between a conversion and its resumption."""
    files = sorted({*(file for file in source.iterdir() if file.is_file()), *side.values()})
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = hashlib.sha256((hf_files(source) / "config.json").read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps([state, config, plan.names]).encode()).hexdigest()
    found: dict[str, Any] = {"source": digest, "target": options.target, "precision": options.precision}
    found |= {"scales": "ue8m0" if plan.power_of_two else "float32"}
    found |= {"tasks": len(plan.sink.tasks())}
    return found | ({"file": options.file_bytes} if options.target == "hf" else {})


def _config_dtype(plan: Plan, tensors: dict[str, TensorRecord]) -> torch.dtype | None:
    """The dtype that config.json names: that of most numbers, bf16 for FP8 folders (as DeepSeek's say)."""
    if plan.fp8_block is not None:
        return torch.bfloat16
    sizes: dict[str, int] = {}
    for record in tensors.values():
        sizes[record.dtype] = sizes.get(record.dtype, 0) + torch.Size(record.shape).numel()
    return getattr(torch, max(sizes, key=lambda name: sizes[name])) if sizes else None


def _check_result(result: Path, plan: Plan, tensors: dict[str, TensorRecord]) -> None:
    """Every tensor arrived, and is in the result with its shape and dtype, as the result's own files say."""
    missing = [name for name in plan.names if name not in tensors]
    if missing:
        raise CheckpointError(f"{result}: {', '.join(missing[:5])} did not arrive")
    shape = plan.shape if plan.fp8_block is not None and plan.raw else without_fp8(plan.shape)
    written = open_raw(result, shape)
    for name, record in tensors.items():
        info = written.tensors.get(name)
        dtype = None if info is None else str(info.dtype).removeprefix("torch.")
        if info is None or list(info.shape) != record.shape or dtype != record.dtype:
            raise CheckpointError(f"{result}: {name} should be {record.dtype}{record.shape}, found {info}")
    written.close()


def _nonfinite_message(nonfinite: dict[str, int], source: Path, reader: CheckpointReader, partial: Path) -> str:
    shown = [
        f"{name} ({count:,} numbers, {reader.tensors[name].file if name in reader.tensors else source})"
        for name, count in list(nonfinite.items())[:5]
    ]
    more = f" and {len(nonfinite) - 5} more" if len(nonfinite) > 5 else ""
    return (
        f"{source}: NaN or infinite weights in {', '.join(shown)}{more}; "
        f"if they are meant, repeat with --resume --allow-nonfinite; if not, remove {partial} and fetch {source} again"
    )
