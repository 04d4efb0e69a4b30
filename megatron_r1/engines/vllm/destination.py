"""A place in a vLLM worker's parameters that a part of a Hugging Face tensor goes to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_r1.resharding.boxes import Box


@dataclass(frozen=True, slots=True)
class Destination:
    """`box` of tensor number `tensor` goes into `parameter` of `module`: rows and columns at these strides (in numbers)
    from `offset` on."""

    tensor: int
    box: Box
    module_name: str
    module: torch.nn.Module
    parameter: str
    offset: int
    row_stride: int
    column_stride: int

    def view(self, box: Box) -> torch.Tensor:
        """Where `box`, a part of its box, goes: [rows, columns] of the parameter's memory as it is now."""
        down, right = box.top - self.box.top, box.left - self.box.left
        offset = self.offset + down * self.row_stride + right * self.column_stride
        values = getattr(self.module, self.parameter).data
        return values.as_strided((box.rows, box.columns), (self.row_stride, self.column_stride), offset)
