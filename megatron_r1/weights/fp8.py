"""DeepSeek's FP8 weights: e4m3 numbers, and one scale for each square block. Pure tensor functions, on CPUs.

A block's weights are `fp8 * weight_scale_inv`. The blocks start at the tensor's corner; those at the right and lower
edge may be smaller. Format: the config.json and inference code of DeepSeek-V3 (arXiv 2412.19437, section 3.3). Scales
are float32, of DeepSeek-V3.1 (scale_fmt "ue8m0") powers of two, which some folders store as e8m0, their exponent alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_r1.weights.table import Entry

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_SUFFIX = "_scale_inv"
"""Appended to a weight's name, this names its scales."""


def scale_shape(rows: int, columns: int, block: int) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] weight."""
    return -(-rows // block), -(-columns // block)


def dequantise(
    codes_RC: torch.Tensor,
    scales: torch.Tensor,
    *,
    block: int,
    out: torch.Tensor,
    first_row: int = 0,
    first_column: int = 0,
) -> torch.Tensor:
    """Write `codes * scales` into `out` and return it.

    codes_RC: e4m3[R, C], contiguous, rows and columns of a larger tensor that start at (first_row, first_column);
    scales: f32[ceil(rows / block), ceil(columns / block)] of the whole tensor; out: contiguous bf16[R, C]. The product
    is rounded to float32 and then to bfloat16, to nearest even. NaN stays NaN.
    """
    from megatron_r1.weights.fp8_kernels import dequantise_kernel  # numba takes half a second that few need

    bits = codes_RC.view(torch.uint8).numpy()
    result = out.view(torch.uint16).numpy()
    if dequantise_kernel(bits, scales.contiguous().numpy(), block, first_row, first_column, result):
        out.masked_fill_((codes_RC.view(torch.uint8) & 0x7F) == 0x7F, torch.nan)
    return out


def block_scales(amax: torch.Tensor, *, power_of_two: bool) -> torch.Tensor:
    """f32 scales of blocks whose largest magnitudes are `amax` (f32): amax / 448, or with `power_of_two` the smallest
    power of two that is not below it (scale_fmt "ue8m0"). 1 where amax / 448 would be no normal float32. Any device."""
    scales = amax / FP8_MAX
    if power_of_two:
        mantissa, exponent = torch.frexp(amax.double() / FP8_MAX)  # amax / 448 = mantissa * 2**exponent, in [.5, 1)
        rounded = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int()).float()
        rounded = torch.where(torch.isfinite(amax), rounded, scales)
    else:
        rounded = scales
    return torch.where(scales >= torch.finfo(torch.float32).tiny, rounded, 1.0)


def quantise(weight_RC: torch.Tensor, *, block: int, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3[R, C], f32 scales) of a float weight whose first row starts a block. A block of zeros has scale 1, and so
    has one of numbers so small that their scale would be no normal float32: they become zeros.

    Each block's largest magnitude becomes 448, with `power_of_two` more than 224. Error of a weight: at most 2**-4 of
    its magnitude, or half of e4m3's smallest step (scale * 2**-10) if that is larger. NaN and infinite weights make
    their block's other weights useless.
    """
    from megatron_r1.weights.fp8_kernels import block_amax

    rows, columns = weight_RC.shape
    scales = torch.ones(scale_shape(rows, columns, block))
    codes = torch.empty(rows, columns, dtype=FP8)
    column_block = torch.arange(columns) // block
    for index in range(scales.shape[0]):
        tile = weight_RC[index * block : (index + 1) * block].float()
        amax = torch.from_numpy(block_amax(tile.contiguous().numpy(), block))
        scales[index] = block_scales(amax, power_of_two=power_of_two)
        codes[index * block : (index + 1) * block].copy_(tile.div(scales[index][column_block]))
    return codes, scales


def fp8_entries(entry: Entry, block: int) -> tuple[Entry, Entry]:
    """How a torch_dist checkpoint keeps an entry in FP8: (codes, scales), under names of their own.

    A model that knows nothing of scales then finds no tensor to misread.
    """
    scales = tuple(name + SCALE_SUFFIX for name in entry.hf)
    shapes = tuple(scale_shape(rows, columns, block) for rows, columns in entry.hf_shapes)
    return (
        replace(entry, name=f"{entry.name}_fp8"),
        replace(entry, name=f"{entry.name}{SCALE_SUFFIX}", hf=scales, hf_shapes=shapes, float32=True, partition=None),
    )
