"""Are two model folders the same model? config.json, names, shapes, dtypes and every number, of any kind of folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.folders import open_checkpoint, read_shape
from megatron_r1.weights.inventory import is_derived, take_inventory
from megatron_r1.weights.pieces import PieceBuffer, row_ranges, runs
from megatron_r1.weights.process import imports_kept, worker_pool
from megatron_r1.weights.reader import CheckpointReader, bytes_equal, read_tensor

GROUP_BYTES = 256 << 20
"""About what a worker compares at a time."""


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


@imports_kept()
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
    tensors are equal if no number differs by more than `tolerance` times the tensor's largest finite magnitude. Raises
    CheckpointError for two folders that are alike but not whole models.
    """
    if workers < 1:
        raise CheckpointError(f"workers is {workers}; it must be at least 1")
    shapes = read_shape(first), read_shape(second)
    readers = open_checkpoint(first, shapes[0]), open_checkpoint(second, shapes[1])
    result = Comparison(differences=_config_differences(*shapes))
    common = _compare_headers((first, second), readers, result, any_dtype=tolerance > 0)
    if result.equal:  # of folders that differ the differences say more
        for folder, shape, reader in zip((first, second), shapes, readers, strict=True):
            take_inventory(reader, shape, folder)
    groups = runs(common, lambda name: readers[0].tensors[name].num_bytes, GROUP_BYTES) if data else []
    for reader in readers:
        reader.close()
    if not groups:
        return result
    done = 0
    setup = ((first, shapes[0]), (second, shapes[1]), tolerance)
    remedy = "try again with fewer --workers"
    with worker_pool(min(workers, len(groups)), _start, *setup, remedy=remedy) as pool:
        for found, size in pool.map(_compare_group, groups):
            result.differences += found
            done += size
            if progress is not None:
                progress(done, result.num_bytes)
    return result


def _config_differences(first: ModelShape, second: ModelShape) -> list[Difference]:
    """What the two config.json say otherwise of the model. FP8 is a way of storing it, not another model."""
    a, b = (asdict(replace(shape, fp8_block=None)) for shape in (first, second))
    return [Difference("config.json", f"{name} is {a[name]} and {b[name]}") for name in a if a[name] != b[name]]


def _compare_headers(
    folders: tuple[Path, Path], readers: tuple[CheckpointReader, CheckpointReader], result: Comparison, any_dtype: bool
) -> list[str]:
    """Names of the tensors whose numbers can be compared; the others' differences go to `result`."""
    common: list[str] = []
    for name in dict.fromkeys([*readers[0].tensors, *readers[1].tensors]):
        a, b = (reader.tensors.get(name) for reader in readers)
        if is_derived(name):
            continue
        if a is None or b is None:
            result.differences.append(Difference(name, f"only in {folders[0] if b is None else folders[1]}"))
        elif a.shape != b.shape:
            result.differences.append(Difference(name, f"shape {list(a.shape)} and {list(b.shape)}"))
        elif a.dtype != b.dtype and not any_dtype:
            result.differences.append(Difference(name, f"dtype {a.dtype} and {b.dtype}"))
        else:
            common.append(name)
            result.num_bytes += a.num_bytes
    result.compared = len(common)
    return common


_pair: list[tuple[CheckpointReader, CheckpointReader, float]] = []
"""What this worker process compares; concurrent.futures has no other place for it."""


def _start(first: tuple[Path, ModelShape], second: tuple[Path, ModelShape], tolerance: float) -> None:
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
            largest = max(largest, _largest(left)) if tolerance else largest
            continue
        x, y = left.double(), right.double()
        same = (x == y) | (torch.isnan(x) & torch.isnan(y))
        if left.dtype == right.dtype:
            same &= torch.signbit(x) == torch.signbit(y)  # -0.0 is not 0.0 where bytes are to be equal
        numbers += int((~same).sum())
        gap = torch.where(same, 0.0, (x - y).abs())
        worst = max(worst, float(gap.nan_to_num(nan=torch.inf).max()))
        largest = max(largest, _largest(x))
    if not numbers or (tolerance and worst <= tolerance * largest):
        return None
    return Difference(name, f"{numbers:,} of {torch.Size(info.shape).numel():,} numbers differ", worst)


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude of a finite number."""
    return float(values.double().abs().nan_to_num(nan=0.0, posinf=0.0).max())
