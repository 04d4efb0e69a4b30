"""DeepSeek's FP8 weights: e4m3 numbers, and one scale for each square block. Pure tensor functions.

A block's weights are `fp8 * weight_scale_inv`. The blocks start at the tensor's corner; those at the right and lower
edge may be smaller. Format: the config.json and inference code of DeepSeek-V3 (arXiv 2412.19437, section 3.3). Scales
are float32, of DeepSeek-V3.1 (scale_fmt "ue8m0") powers of two, which some folders store as e8m0, their exponent alone.
"""

from __future__ import annotations

from collections.abc import Callable
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
    is rounded to float32 and then to bfloat16, to nearest even. NaN stays NaN. On CPUs only.
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
    """(e4m3[R, C], f32 scales) of a float weight whose first row starts a block, on its own device. A block of zeros
    has scale 1, and so has one of numbers so small that their scale would be no normal float32: they become zeros.

    Each block's largest magnitude becomes 448, with `power_of_two` more than 224. Error of a weight: at most 2**-4 of
    its magnitude, or half of e4m3's smallest step (scale * 2**-10) if that is larger. NaN and infinite weights make
    their block's other weights useless. CPUs go a row of blocks at a time, which stays in the cache; elsewhere the
    whole weight is computed at once and has three fp32 copies meanwhile.
    """
    rows, columns = weight_RC.shape
    scales = torch.empty(scale_shape(rows, columns, block), device=weight_RC.device)
    codes_RC = torch.empty(weight_RC.shape, dtype=FP8, device=weight_RC.device)
    if weight_RC.device.type != "cpu":
        quantise_rows(weight_RC, block_amax, codes_RC, scales, block=block, power_of_two=power_of_two)
        return codes_RC, scales
    from megatron_r1.weights.fp8_kernels import strip_amax

    def amax_of(strip_RC: torch.Tensor, block: int) -> torch.Tensor:
        return torch.from_numpy(strip_amax(strip_RC.contiguous().numpy(), block))

    for index in range(scales.shape[0]):
        strip = slice(index * block, (index + 1) * block)
        out = codes_RC[strip], scales[index : index + 1]
        quantise_rows(weight_RC[strip], amax_of, *out, block=block, power_of_two=power_of_two)
    return codes_RC, scales


def quantise_rows(
    weight_RC: torch.Tensor,
    amax_of: Callable[[torch.Tensor, int], torch.Tensor],
    codes_RC: torch.Tensor,
    scales: torch.Tensor,
    *,
    block: int,
    power_of_two: bool,
) -> None:
    """Write codes (e4m3[R, C]) and scales (f32) of whole rows of blocks, whose largest magnitudes are
    `amax_of(f32[R, C], block)`."""
    rows, columns = weight_RC.shape
    weight_RC = weight_RC.float()
    scales.copy_(block_scales(amax_of(weight_RC, block), power_of_two=power_of_two))
    divisor_RC = scales.repeat_interleave(block, 1)[:, :columns]  # one row serves a row of blocks
    if rows > block:
        divisor_RC = divisor_RC.repeat_interleave(block, 0)[:rows]
    codes_RC.copy_(weight_RC.div(divisor_RC))


def block_amax(weight_RC: torch.Tensor, block: int) -> torch.Tensor:
    """f32[ceil(R / block), ceil(C / block)]: the largest magnitude of each block of f32[R, C]. Any device."""
    rows, columns = weight_RC.shape
    tall, wide = scale_shape(rows, columns, block)
    padded = weight_RC.new_zeros(tall * block, wide * block)
    torch.abs(weight_RC, out=padded[:rows, :columns])
    return padded.view(tall, block, wide, block).amax(dim=(1, 3))


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
