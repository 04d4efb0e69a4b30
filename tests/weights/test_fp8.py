"""FP8 block (de)quantisation against torch's own e4m3 numbers and float64 arithmetic."""

import pytest
import torch

from megatron_r1.weights.fp8 import FP8, dequantise, quantise, scale_shape


def dequantised(codes, scales, block=128, **place):
    return dequantise(codes, scales, block=block, out=torch.empty(codes.shape, dtype=torch.bfloat16), **place)


def reference(codes, scales, block=128):
    """float64 product, rounded to float32 and then to bfloat16."""
    rows, columns = codes.shape
    full = scales.double().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (codes.float().double() * full).float().bfloat16()


def random_codes(rows, columns, seed=0):
    bits = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    bits[(bits & 0x7F) == 0x7F] = 0
    return bits.view(FP8)


def test_all_256_codes_at_scale_one():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(FP8)
    found, expected = dequantised(codes, torch.ones(1, 1)), codes.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan()) and int(found.isnan().sum()) == 2
    keep = ~expected.isnan()
    assert torch.equal(found[keep].view(torch.int16), expected[keep].view(torch.int16))  # -0.0 stays -0.0


@pytest.mark.parametrize("rows,columns", [(128, 128), (1, 1), (300, 129), (576, 260), (127, 500)])
def test_ragged_tensors_equal_float64(rows, columns):
    codes = random_codes(rows, columns)
    scales = torch.rand(scale_shape(rows, columns, 128)) * 1e-2 + 1e-5
    assert torch.equal(dequantised(codes, scales), reference(codes, scales))


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1.0, 3e4, 7e5])
def test_scales_of_any_size(scale):
    codes, scales = random_codes(64, 64), torch.full((1, 1), scale)
    assert torch.equal(dequantised(codes, scales), reference(codes, scales))


def test_a_part_is_the_whole_at_its_place():
    codes, scales = random_codes(400, 300), torch.rand(4, 3)
    whole = dequantised(codes, scales)
    part = dequantised(codes[100:333].contiguous(), scales, first_row=100)
    assert torch.equal(part, whole[100:333])
    part = dequantised(codes[:, 90:260].contiguous(), scales, first_column=90)
    assert torch.equal(part, whole[:, 90:260])


def test_other_block_sizes():
    codes, scales = random_codes(100, 90), torch.rand(4, 3)
    assert torch.equal(dequantised(codes, scales, block=32), reference(codes, scales, block=32))


@pytest.mark.parametrize("rows,columns", [(128, 128), (300, 129), (5, 700)])
def test_round_trip_obeys_the_formats_error_bound(rows, columns):
    weight = (torch.randn(rows, columns, dtype=torch.float64) * torch.rand(rows, 1).mul(6).exp()).bfloat16()
    codes, scales = quantise(weight, block=128)
    full = scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    exact = weight.double()
    error = (codes.float().double() * full - exact).abs()
    bound = torch.maximum(exact.abs() * 2.0**-4, full * 2.0**-10) * (1 + 1e-6)
    assert (error <= bound).all()
    again = dequantised(codes, scales).double()
    assert ((again - exact).abs() <= bound + again.abs() * 2.0**-8).all()  # and bfloat16's own half step


def test_the_largest_of_a_block_is_448_and_zeros_stay():
    weight = torch.zeros(256, 128)
    weight[3, 5] = -0.7
    codes, scales = quantise(weight, block=128)
    assert codes[3, 5].float() == -448 and scales[0, 0] == torch.tensor(0.7) / 448
    assert scales[1, 0] == 1 and not codes[128:].float().any()


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-41, 1e-44])
def test_numbers_too_small_for_a_scale_become_zeros_not_nan(size):
    codes, scales = quantise(torch.rand(128, 128) * size, block=128)
    assert (scales == 1).all() and not codes.float().isnan().any() and not codes.float().any()


def test_quantising_what_was_fp8_gives_it_back():
    codes, scales = random_codes(256, 256), torch.tensor([[2.0**-7, 2.0**-9], [2.0**-3, 2.0**-8]])
    codes.view(torch.uint8)[::128, ::128] = 0x7E  # 448 in every block
    assert torch.equal(quantise(dequantised(codes, scales), block=128)[1], scales)
    assert torch.equal(quantise(dequantised(codes, scales), block=128)[0].float(), codes.float())
