"""Fingerprints against Python's integers, cut in every way, and what they must notice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.weights.fingerprint import BLOCK, CHUNK_NUMBERS, COLUMNS, ROWS, content, fingerprint

WRAP = 1 << 64


def factor(salt: int, place: int) -> int:
    return int(np.random.Philox(key=salt + place // BLOCK).random_raw(BLOCK)[place % BLOCK]) | 1


def by_hand(bits: list[list[int]], box: Box) -> int:
    total = 0
    for r, row in enumerate(bits):
        for c, number in enumerate(row):
            total += number * factor(ROWS, box.top + r) * factor(COLUMNS, box.left + c)
    total %= WRAP
    return total - WRAP if total >= WRAP // 2 else total


@pytest.mark.parametrize("box", [Box(0, 3, 0, 2), Box(4094, 4097, 8191, 8193)])
def test_it_is_the_sum_that_its_page_says(box):
    """The second box lies across blocks of factors. 1.0 in bf16 is 0x3F80, -2.0 is 0xC000, -16384 as signed."""
    values = torch.tensor([[1.0, -2.0], [0.0, 1.0], [-2.0, -2.0]], dtype=torch.bfloat16)
    bits = [[0x3F80, -0x4000], [0, 0x3F80], [-0x4000, -0x4000]]
    assert int(fingerprint(values, box)) == by_hand(bits, box)


@given(st.data())
def test_parts_add_up_however_they_are_cut(data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]))
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).mul(50).to(dtype)
    across = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    along = sorted({0, columns, *data.draw(st.lists(st.integers(0, columns), max_size=3))})
    total = torch.zeros((), dtype=torch.int64)
    for top, bottom in itertools.pairwise(across):
        for left, right in itertools.pairwise(along):
            total += fingerprint(values[top:bottom, left:right], Box(top, bottom, left, right))
    assert int(total) == int(fingerprint(values, whole((rows, columns))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_one_bit_or_of_the_order_is_noticed(dtype):
    values = torch.randn(33, 17, generator=torch.Generator().manual_seed(1)).to(dtype)
    full = whole((33, 17))
    known = int(fingerprint(values, full))
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for place in range(0, 33 * 17, 7):
        other = values.clone()
        other.view(integers).view(-1)[place] ^= 1 << (place % (8 * dtype.itemsize - 1))
        assert int(fingerprint(other, full)) != known
    assert int(fingerprint(values.flip(0), full)) != known
    assert int(fingerprint(values.flip(1), full)) != known
    assert int(fingerprint(values[:17].T.contiguous(), Box(0, 17, 0, 17))) != int(
        fingerprint(values[:17], Box(0, 17, 0, 17))
    )


def test_large_ones_are_widened_in_pieces():
    values = torch.randn(3000, 700, generator=torch.Generator().manual_seed(2))
    halves = [fingerprint(values[a:b], Box(a, b, 0, 700)) for a, b in ((0, 1001), (1001, 3000))]
    assert int(fingerprint(values, whole((3000, 700)))) == int(halves[0] + halves[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_content_is_the_same_in_any_order_and_with_zeros(dtype):
    torch.manual_seed(0)
    values = torch.randn(30, 50).to(dtype)
    order = torch.randperm(values.numel())
    moved = torch.cat([torch.zeros(75), values.flatten()[order].float()]).to(dtype).view(7, -1)
    assert content(moved) == content(values) != 0
    assert content(torch.zeros(9, dtype=dtype)) == 0


def test_a_content_changes_with_any_number():
    """Numbers that swap bits too, of which a sum of the bits alone would see nothing: 1 + 8 = 0 + 9 = 2 + 7."""
    for other in ([0, 9], [2, 7], [1, 1], [1, 0], [8, 8]):
        numbers = torch.tensor([other], dtype=torch.int32).view(torch.float32)
        assert content(numbers) != content(torch.tensor([[1, 8]], dtype=torch.int32).view(torch.float32))


def test_a_content_of_many_numbers_is_the_sum_of_their_parts():
    values = torch.randn(3, CHUNK_NUMBERS // 2 + 5)
    assert content(values) == content(values[:1]) + content(values[1:])
