"""The inner loops of FP8 conversion, compiled by numba: torch converts e4m3 one number at a time on CPUs.

Each loop over columns becomes vector code; all in one loop they would not.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit("boolean(u1[:,::1], f4[:,::1], i8, i8, i8, u2[:,::1])", cache=True, nogil=True)
def dequantise_kernel(codes, scales, block, first_row, first_column, out) -> bool:
    """Returns whether there was a NaN (0x7f or 0xff), which it writes as the number that the bits would be. A NaN scale
    makes NaN.

    e4m3's fields moved to float32's place make the number over 2**120 (exponent biases 7 and 127), subnormals too.
    """
    rows, columns = codes.shape
    word = np.empty(columns, np.uint32)
    value = word.view(np.float32)
    scale = np.empty(columns, np.float32)
    seen = np.uint32(0)
    for row in range(rows):
        if row == 0 or (first_row + row) % block == 0:
            for i in range(columns):
                scale[i] = scales[(first_row + row) // block, (first_column + i) // block]
        source, target = codes[row], out[row]
        for i in range(columns):
            bits = np.uint32(source[i])
            magnitude = bits & np.uint32(0x7F)
            word[i] = (bits & np.uint32(0x80)) << np.uint32(24) | magnitude << np.uint32(20)
            seen |= magnitude + np.uint32(1)  # reaches bit 7 for NaN only
        for i in range(columns):
            value[i] = value[i] * np.float32(2.0**120) * scale[i]
        for i in range(columns):
            bits = word[i]
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # rounding could carry it to 0
            target[i] = np.uint16(np.uint32(0x7FC0) if is_nan else rounded)
    return seen & np.uint32(0x80) != 0


@numba.njit("f4[::1](f4[:,::1], i8)", cache=True, nogil=True)
def block_amax(tile, block):
    """Largest magnitude in each run of `block` columns. Magnitudes are compared as bits, which orders them."""
    rows, columns = tile.shape
    amax = np.zeros(-(-columns // block), np.uint32)
    bits = tile.view(np.uint32)
    for row in range(rows):
        for index in range(amax.size):
            largest = amax[index]
            run = bits[row, index * block : (index + 1) * block]
            for i in range(run.size):
                largest = max(largest, run[i] & np.uint32(0x7FFFFFFF))
            amax[index] = largest
    return amax.view(np.float32)
