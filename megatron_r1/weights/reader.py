"""What loading, conversion and verification read weights through: tensors under Hugging Face names, rows at a time.

Two kinds of folders have it: Hugging Face's (hf_folder.py) and Megatron's torch_dist (torch_dist.py). Rows go straight
into the caller's buffer, so that a tensor of any size needs no memory but that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_r1.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a reader gives it. `file` is where its bytes lie, for messages."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointReader(Protocol):
    """Read-only view of a model folder. `bytes_read` counts the tensor bytes that were read from files."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def bytes_read(self) -> int: ...

    def read_rows(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` (writable bytes, C order) with rows [start, stop) of the tensor, in its `TensorInfo.dtype`."""
        ...

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns [start, stop) of a matrix."""
        ...

    def close(self) -> None: ...


def read_tensor(reader: CheckpointReader, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of a tensor (all of it by default), in fresh memory."""
    info = reader.tensors[name]
    stop = info.num_rows if stop is None else stop
    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    out = torch.empty(shape, dtype=info.dtype)
    if out.numel():
        reader.read_rows(name, start, stop, byte_view(out))
    return out


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data.cast("B")


def tensor_view(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over a buffer's bytes, without a copy. Its storage is exactly those bytes."""
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def bytes_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two contiguous tensors hold the same bytes (NaN equals the same NaN, -0.0 is not 0.0)."""
    if not left.numel():
        return True
    return torch.equal(
        torch.frombuffer(byte_view(left), dtype=torch.uint8), torch.frombuffer(byte_view(right), dtype=torch.uint8)
    )


def read_exactly(handle: int, offset: int, out: memoryview, file: str) -> None:
    """Fill `out` from an open file. Raises CheckpointError naming `file` if it ends before, or the disk fails."""
    done = 0
    while done < len(out):
        try:
            count = os.preadv(handle, [out[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}); fetch it again") from error
        if count == 0:
            raise CheckpointError(f"{file}: ends early; it was cut while it was being read")
        done += count
