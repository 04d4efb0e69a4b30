"""Are two model folders the same model? Names, shapes, dtypes and every number, whatever the folders' kinds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_r1.config.shape import ModelShape
from megatron_r1.weights.folders import open_checkpoint, read_shape
from megatron_r1.weights.pieces import PieceBuffer, row_ranges
from megatron_r1.weights.reader import CheckpointReader, byte_view, read_tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same. `worst` is the largest |a - b| in float32 (NaN if only one is NaN there)."""

    name: str
    what: str
    worst: float = 0.0


@dataclass(slots=True)
class Comparison:
    compared: int = 0
    num_bytes: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences


def compare(
    first: Path,
    second: Path,
    *,
    workers: int = 2,
    data: bool = True,
    tolerance: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare two folders under Hugging Face names, FP8 weights as the bf16 numbers that they stand for.

    With `data` every byte of both is read. A dtype that differs is a difference unless a tolerance is given; then
    tensors are equal if no number differs by more than `tolerance` times the tensor's largest magnitude.
    """
    shapes = read_shape(first), read_shape(second)
    readers = open_checkpoint(first, shapes[0]), open_checkpoint(second, shapes[1])
    result = Comparison()
    common: list[str] = []
    for name in sorted(set(readers[0].tensors) | set(readers[1].tensors), key=_natural(readers)):
        a, b = (reader.tensors.get(name) for reader in readers)
        if a is None or b is None:
            result.differences.append(Difference(name, f"only in {first if b is None else second}"))
        elif a.shape != b.shape:
            result.differences.append(Difference(name, f"shape {list(a.shape)} and {list(b.shape)}"))
        elif a.dtype != b.dtype and not tolerance:
            result.differences.append(Difference(name, f"dtype {a.dtype} and {b.dtype}"))
        else:
            common.append(name)
            result.num_bytes += a.num_bytes
    total, done = result.num_bytes, 0
    for reader in readers:
        reader.close()
    result.compared = len(common)
    if not data:
        return result
    groups = _groups(common, readers[0])
    context = multiprocessing.get_context("fork")
    setup = ((first, shapes[0]), (second, shapes[1]), tolerance)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=setup) as pool:
        for found, size in pool.map(_compare_group, groups):
            result.differences += found
            done += size
            if progress is not None:
                progress(done, total)
    return result


def _natural(readers: tuple[CheckpointReader, CheckpointReader]):
    order = {name: number for number, name in enumerate([*readers[0].tensors, *readers[1].tensors])}
    return lambda name: order[name]


def _groups(names: list[str], reader: CheckpointReader, limit: int = 256 << 20) -> list[list[str]]:
    groups: list[list[str]] = []
    size = 0
    for name in names:
        if not groups or size + reader.tensors[name].num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += reader.tensors[name].num_bytes
    return groups


_pair: list[tuple[CheckpointReader, CheckpointReader, float]] = []
"""What this worker process compares; concurrent.futures has no other place for it."""


def _start(first: tuple[Path, ModelShape], second: tuple[Path, ModelShape], tolerance: float) -> None:
    torch.set_num_threads(1)
    _pair[:] = [(open_checkpoint(*first), open_checkpoint(*second), tolerance)]


def _compare_group(names: list[str]) -> tuple[list[Difference], int]:
    a, b, tolerance = _pair[0]
    buffer = PieceBuffer()
    found = []
    for name in names:
        difference = _compare_tensor(a, b, name, tolerance, buffer)
        if difference is not None:
            found.append(difference)
    return found, sum(a.tensors[name].num_bytes for name in names)


def _compare_tensor(
    a: CheckpointReader, b: CheckpointReader, name: str, tolerance: float, buffer: PieceBuffer
) -> Difference | None:
    info = a.tensors[name]
    numbers, worst, largest = 0, 0.0, 0.0
    for start, stop in row_ranges(info.num_rows, info.row_bytes):
        left = buffer.read(a, name, start, stop)
        right = read_tensor(b, name, start, stop)
        if left.dtype == right.dtype and bytes_equal(left, right):
            largest = max(largest, float(left.float().abs().max())) if tolerance and left.numel() else largest
            continue
        x, y = left.double(), right.double()
        same = (x == y) | (torch.isnan(x) & torch.isnan(y))
        if left.dtype == right.dtype:
            same &= torch.signbit(x) == torch.signbit(y)  # -0.0 is not 0.0 where bytes are to be equal
        numbers += int((~same).sum())
        gap = torch.where(same, 0.0, (x - y).abs())
        worst = max(worst, float(gap.nan_to_num(nan=torch.inf).max()))
        largest = max(largest, float(x.abs().nan_to_num().max()))
    if not numbers or (tolerance and worst <= tolerance * largest):
        return None
    return Difference(name, f"{numbers:,} of {torch.Size(info.shape).numel():,} numbers differ", worst)


def bytes_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two contiguous tensors hold the same bytes (NaN equals the same NaN, -0.0 is not 0.0)."""
    if not left.numel():
        return True
    return torch.equal(
        torch.frombuffer(byte_view(left), dtype=torch.uint8), torch.frombuffer(byte_view(right), dtype=torch.uint8)
    )
