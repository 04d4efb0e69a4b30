"""FP8 block (de)quantisation against torch's own e4m3 numbers and float64 arithmetic."""

import math

import pytest
import torch

from megatron_r1.weights.fp8 import FP8, block_amax, dequantise, quantise, quantise_rows, scale_shape


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


def test_powers_of_two_by_hand():
    """448 has scale 1 exactly, 450 scale 2; 224.5 / 448 rounds up to 1; the codes are those of float64 division."""
    weight = torch.zeros(128, 4 * 128)
    for column, (largest, second) in enumerate([(448.0, 3.0), (450.0, -3.0), (224.5, 0.3), (0.011, 0.002)]):
        weight[0, column * 128], weight[1, column * 128] = largest, second
    codes, scales = quantise(weight, block=128, power_of_two=True)
    assert scales.tolist() == [[1.0, 2.0, 1.0, 2.0**-15]]  # .011 / 448 is 2**-15.31
    exact = weight.double() / scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(codes.float(), exact.float().to(FP8).float())


@pytest.mark.parametrize("seed", range(3))
def test_powers_of_two_are_the_smallest_that_hold_their_block(seed):
    """Against float64 logarithms and torch's own e8m0 numbers, over all of float32's magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(130, 700, generator=generator) * torch.rand(130, 700, generator=generator).mul(6).exp()
    weight *= 10.0 ** float(torch.randint(-30, 30, (), generator=generator))
    codes, scales = quantise(weight, block=128, power_of_two=True)
    assert torch.equal(scales.to(torch.float8_e8m0fnu).float(), scales)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            tile = weight[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128].double()
            largest = float(tile.abs().max())
            assert scales[row, column] == 2.0 ** math.ceil(math.log2(largest / 448))
            code = codes[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128].double()
            error = (code * float(scales[row, column]) - tile).abs()
            assert (error <= (tile.abs() * 2.0**-4).clamp_min(float(scales[row, column]) * 2.0**-10) * (1 + 1e-6)).all()


def test_powers_of_two_survive_quantising_again():
    codes, scales = random_codes(256, 256), torch.tensor([[2.0**-7, 2.0**-9], [2.0**-3, 2.0**-8]])
    codes.view(torch.uint8)[::128, ::128] = 0x7E  # 448 in every block
    again = quantise(dequantised(codes, scales), block=128, power_of_two=True)
    assert torch.equal(again[1], scales) and torch.equal(again[0].float(), codes.float())


def test_nan_and_infinity_of_a_block_stay_visible():
    for bad in (torch.nan, torch.inf):
        weight = torch.ones(128, 128)
        weight[3, 4] = bad
        scales = quantise(weight, block=128, power_of_two=True)[1]
        assert torch.equal(scales.isnan(), quantise(weight, block=128)[1].isnan())


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 65), (1, 300), (127, 129)])
def test_all_at_once_as_on_gpus_gives_the_bits_of_a_strip_at_a_time(shape, dtype, power_of_two):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:128, :64] = 0
    weight[-1, -1] = torch.nan
    given = weight.clone()
    codes, scales = torch.empty(shape, dtype=FP8), torch.empty(scale_shape(*shape, 128))
    quantise_rows(weight, block_amax, codes, scales, block=128, power_of_two=power_of_two)
    expected_codes, expected_scales = quantise(weight, block=128, power_of_two=power_of_two)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(weight.nan_to_num(), given.nan_to_num()), "what is quantised stays as it is"
