"""A number that says whether two copies of a weight are the same to the bit, wherever their parts lie.

    fingerprint = sum over rows r and columns c of  bits[r, c] * u(r) * v(c)   modulo 2^64

bits: the number's bits as an integer; u, v: odd 64-bit numbers that depend on the position in the whole tensor. It is a
sum, so parts on several ranks add up to the whole's, however each side is cut. One changed number always changes it,
because an odd factor has an inverse modulo 2^64; several changes, rows or columns in another order included, leave it
alike with a chance of about 2^-63.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from megatron_r1.resharding.boxes import Box

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_NUMBERS = 1 << 18
"""Numbers that are widened to 64 bits at once on a CPU, whose cache would not hold more of them."""
LAUNCHED_NUMBERS = 1 << 20
"""On other devices, where every operation must be launched."""
BLOCK = 4096
"""Factors that are made, and kept, at once."""
ROWS, COLUMNS = 0x243F6A8885A308D3, 0x13198A2E03707344


def fingerprint(values: torch.Tensor, box: Box) -> torch.Tensor:
    """int64 scalar, on the device of `values`: [rows, columns] of any dtype, which lie at `box` of their tensor."""
    integers = INTEGERS[values.element_size()]
    u_R = _factors(ROWS, box.top, box.bottom, values.device)
    v_C = _factors(COLUMNS, box.left, box.right, values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    step = max(1, _chunk(values.device) // max(1, box.columns))
    for first in range(0, box.rows, step):
        bits_RC = values[first : first + step].contiguous().view(integers).to(torch.int64, copy=True)
        total += (bits_RC.mul_(v_C).sum(1) * u_R[first : first + step]).sum()
    return total


def content(values: torch.Tensor) -> torch.Tensor:
    """int64 scalar, on the device of `values`, which may have any shape and a dtype of up to 8 bytes: a sum over their
    bits that their order does not change, and to which zeros add nothing."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in values.detach().reshape(-1).split(_chunk(values.device)):
        bits = part.view(INTEGERS[part.element_size()]).to(torch.int64, copy=True).mul_(ROWS | 1)
        bits.bitwise_xor_(bits >> 29).mul_(COLUMNS | 1)  # no linear map: numbers that swap bits must not cancel out
        total += bits.bitwise_xor_(bits >> 32).sum()
    return total


def _chunk(device: torch.device) -> int:
    return CHUNK_NUMBERS if device.type == "cpu" else LAUNCHED_NUMBERS


def _factors(salt: int, first: int, last: int, device: torch.device) -> torch.Tensor:
    """int64[last - first]: those of positions `first` to `last`."""
    numbers = range(first // BLOCK, -(-last // BLOCK))
    blocks = torch.cat([_block(salt, number, str(device)) for number in numbers])
    begin = numbers.start * BLOCK
    return blocks[first - begin : last - begin]


@functools.lru_cache(maxsize=1024)
def _block(salt: int, number: int, device: str) -> torch.Tensor:
    raw = np.random.Philox(key=salt + number).random_raw(BLOCK)  # the same in every version of numpy
    return torch.from_numpy((raw | np.uint64(1)).view(np.int64)).to(device)
