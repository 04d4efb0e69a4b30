"""Blockwise FP8 matrix products in plain torch, as DeepSeek-V3 (arXiv 2412.19437, section 3.3) and Transformer Engine's
blockwise recipe compute them: for reading and for bounds, on any device.

Shapes: x[M, K] times w[N, K] transposed is y[M, N]. Activations and gradients have a scale for each 1 x 128 numbers
along the summed dimension, weights one for each 128 x 128.
"""

from __future__ import annotations

import torch

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
RELATIVE = 2.0**-4
"""Rounding to e4m3 (3 mantissa bits) moves a normal number by at most this share of it,"""
ABSOLUTE = 2.0**-10
"""and a subnormal one by at most this, before scaling."""


def quantise(values: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rounded numbers f32, scales f32, both of the shape of `values`) with blocks of rows x 128; the number that
    stands for values[i, j] is rounded[i, j] * scales[i, j]."""
    height, width = values.shape
    padded = torch.zeros(-(-height // rows) * rows, -(-width // BLOCK) * BLOCK)
    padded[:height, :width] = values
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scales = torch.where(amax > 0, amax / FP8_MAX, torch.ones(())).expand_as(blocks).reshape(padded.shape)
    scales = scales[:height, :width].contiguous()
    return (values / scales).to(FP8).float(), scales


def product(left: torch.Tensor, right: torch.Tensor, *, left_rows: int = 1, right_rows: int = BLOCK) -> torch.Tensor:
    """left[M, K] @ right[N, K].T of numbers quantised in blocks of left_rows and right_rows by 128; each 128 products
    are summed in fp32, scaled, and added to an fp32 total (the paper's promotion)."""
    (a, a_scales), (b, b_scales) = quantise(left, left_rows), quantise(right, right_rows)
    total = torch.zeros(left.shape[0], right.shape[0])
    for start in range(0, left.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        scale = a_scales[:, start, None] * b_scales[None, :, start]
        total += (a[:, part] @ b[:, part].T) * scale
    return total


class Linear(torch.autograd.Function):
    """y = x @ w.T with its three products in FP8: forward, the gradient to x, and the gradient to w (whose two factors
    both have 1 x 128 blocks, along the tokens)."""

    @staticmethod
    def forward(context, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    def backward(context, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = context.saved_tensors
        dx = product(dy, w.T.contiguous())
        dw = product(dy.T.contiguous(), x.T.contiguous(), right_rows=1)
        return dx, dw


def bound(left: torch.Tensor, right: torch.Tensor, *, left_rows: int = 1, right_rows: int = BLOCK) -> torch.Tensor:
    """f64[M, N]: no product of the two may be farther from the exact one than this.

    With |da| <= max(RELATIVE |a|, ABSOLUTE scale) for each number, and fp32 sums of K terms:
    sum |da||b| + |a||db| + |da||db| + K 2**-24 sum |a'||b'|."""
    a, b = left.double(), right.double()
    da = torch.maximum(RELATIVE * a.abs(), ABSOLUTE * quantise(left, left_rows)[1].double())
    db = torch.maximum(RELATIVE * b.abs(), ABSOLUTE * quantise(right, right_rows)[1].double())
    rounded = da @ b.abs().T + a.abs() @ db.T + da @ db.T
    summed = left.shape[1] * 2.0**-24 * ((a.abs() + da) @ (b.abs() + db).T)
    return rounded + summed
