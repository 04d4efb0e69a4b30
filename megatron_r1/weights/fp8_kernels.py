"""The inner loops of FP8 conversion, compiled by numba: torch converts e4m3 one number at a time on CPUs.

Each loop over columns becomes vector code; all in one loop they would not.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit("boolean(u1[::1])", cache=True, nogil=True)
def _any_nan(codes) -> bool:
    """Adding 1 to seven bits reaches the eighth for NaN only. Eight codes at a time."""
    whole = codes.size // 8 * 8
    seen = np.uint64(0)
    for eight in codes[:whole].view(np.uint64):
        seen |= (eight & np.uint64(0x7F7F7F7F7F7F7F7F)) + np.uint64(0x0101010101010101)
    for code in codes[whole:]:
        seen |= np.uint64((code & np.uint8(0x7F)) + np.uint8(1))
    return seen & np.uint64(0x8080808080808080) != 0


@numba.njit("boolean(u1[:,::1], f4[:,::1], i8, i8, i8, u2[:,::1])", cache=True, nogil=True)
def dequantise_kernel(codes, scales, block, first_row, first_column, out) -> bool:
    """Returns whether there was a NaN (0x7f or 0xff), which it writes as the number that the bits would be. A NaN scale
    makes NaN.

    e4m3's fields moved to float32's place make the number over 2**120 (exponent biases 7 and 127), subnormals too.
    """
    rows, columns = codes.shape
    word = np.empty(block, np.uint32)  # a block's row at a time: it stays in the first-level cache
    value = word.view(np.float32)
    seen = False
    for row in range(rows):
        scales_of_row = scales[(first_row + row) // block]
        start = 0
        while start < columns:
            index = (first_column + start) // block
            size = min((index + 1) * block - first_column, columns) - start
            source, target = codes[row, start : start + size], out[row, start : start + size]
            for i in range(size):
                bits = np.uint32(source[i])
                sign = (bits << np.uint32(24)) & np.uint32(0x80000000)
                word[i] = sign | ((bits << np.uint32(20)) & np.uint32(0x07F00000))
            scale = scales_of_row[index]
            if abs(scale) < np.float32(128.0):  # scale * 2**120 is finite, and exact: one rounding, as of the product
                factor = scale * np.float32(2.0**120)
                for i in range(size):
                    value[i] = value[i] * factor
            else:
                if np.isnan(scale):
                    scale = np.float32(np.nan)  # rounding could carry another NaN's bits to 0
                for i in range(size):
                    value[i] = value[i] * np.float32(2.0**120) * scale
            for i in range(size):
                bits = word[i]
                odd = (bits >> np.uint32(16)) & np.uint32(1)
                target[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            start += size
        seen |= _any_nan(codes[row])
    return seen


@numba.njit("f4[::1](f4[:,::1], i8)", cache=True, nogil=True)
def strip_amax(tile, block):
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
