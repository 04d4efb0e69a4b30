"""A reader that gives FP8 weights in bfloat16: it stands before any other reader and hides the scales."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_r1.errors import CheckpointError
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, dequantise, scale_shape
from megatron_r1.weights.reader import CheckpointReader, TensorInfo, byte_view, read_tensor, tensor_view


class DequantisedReader:
    """The tensors of `raw`, with each e4m3 matrix multiplied by its block scales. Holds one tensor's scales at a time.

    Raises CheckpointError for a matrix without scales, scales without a matrix, or scales of another shape.
    """

    def __init__(self, raw: CheckpointReader, *, block: int) -> None:
        self._raw, self._block = raw, block
        self._cached: tuple[str, torch.Tensor] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in raw.tensors.items():
            if name.endswith(SCALE_SUFFIX):
                self._check_scales(name, info)
            elif info.dtype == FP8:
                if name + SCALE_SUFFIX not in raw.tensors:
                    raise CheckpointError(f"{info.file}: {name} is FP8 and has no {name}{SCALE_SUFFIX}")
                self.tensors[name] = replace(info, dtype=torch.bfloat16)
            else:
                self.tensors[name] = info

    @property
    def bytes_read(self) -> int:
        return self._raw.bytes_read

    def close(self) -> None:
        self._raw.close()

    def read_rows(self, name: str, start: int, stop: int, out: memoryview) -> None:
        if self._raw.tensors[name].dtype != FP8:
            self._raw.read_rows(name, start, stop, out)
            return
        shape = (stop - start, self.tensors[name].shape[1])
        codes = torch.empty(shape, dtype=FP8)
        self._raw.read_rows(name, start, stop, byte_view(codes))
        target = tensor_view(out, torch.bfloat16, shape)
        dequantise(codes, self._scales(name), block=self._block, out=target, first_row=start)

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        part = self._raw.read_columns(name, start, stop)
        if part.dtype != FP8:
            return part
        out = torch.empty(part.shape, dtype=torch.bfloat16)
        return dequantise(part, self._scales(name), block=self._block, out=out, first_column=start)

    def _scales(self, name: str) -> torch.Tensor:
        if self._cached is None or self._cached[0] != name:
            self._cached = name, read_tensor(self._raw, name + SCALE_SUFFIX).float()
        return self._cached[1]

    def _check_scales(self, name: str, info: TensorInfo) -> None:
        weight = self._raw.tensors.get(name.removesuffix(SCALE_SUFFIX))
        if weight is None or weight.dtype != FP8 or len(weight.shape) != 2:
            raise CheckpointError(f"{info.file}: {name} has no FP8 matrix that it would scale")
        rows, columns = weight.shape
        wanted = scale_shape(rows, columns, self._block)
        if info.shape != wanted or not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{info.file}: {name} is {info.dtype} of shape {list(info.shape)}; blocks of {self._block} on "
                f"{list(weight.shape)} make it torch.float32 of shape {list(wanted)}"
            )
