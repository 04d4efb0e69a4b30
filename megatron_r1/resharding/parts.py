"""Parts of tensors on their way from ranks to workers, many at a time: columns of numbers, a part each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

ALIGNMENT_BYTES = 16
"""Every piece begins at a multiple of this in its message, so that its bytes can be viewed as any dtype in place."""

WORKER, WANT, TENSOR, TOP, BOTTOM, LEFT, RIGHT, ITEMSIZE, HOLDERS, SENDER = range(10)
"""Rows of a table: worker and the number of its want; the tensor and the box of it; bytes of a number; the number of
the set of ranks that hold the part, and which of them sends it."""


class Parts:
    """`table`: int64[10, parts]. Its rows are read by name, as views."""

    def __init__(self, table: Numbers) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.shape[1]

    worker = property(lambda self: self.table[WORKER])
    tensor = property(lambda self: self.table[TENSOR])
    holders = property(lambda self: self.table[HOLDERS])
    sender = property(lambda self: self.table[SENDER])

    @property
    def rows(self) -> Numbers:
        return self.table[BOTTOM] - self.table[TOP]

    @property
    def row_bytes(self) -> Numbers:
        return (self.table[RIGHT] - self.table[LEFT]) * self.table[ITEMSIZE]

    @property
    def num_bytes(self) -> Numbers:
        return self.rows * self.row_bytes

    def take(self, which: Numbers | slice) -> Parts:
        return Parts(self.table[:, which])

    def cut(self, at: Numbers) -> tuple[Parts, Numbers]:
        """Laid end to end, cut at these bytes (ascending, each at the beginning of a row or part): the parts, and the
        byte at which each begins."""
        sizes = self.num_bytes
        ends = np.cumsum(sizes)
        starts = np.union1d(ends - sizes, at[at < ends[-1]])
        whole = np.searchsorted(ends, starts, side="right")
        table, row_bytes = self.table[:, whole], self.row_bytes[whole]
        first = (starts - (ends - sizes)[whole]) // row_bytes
        table[TOP] += first
        table[BOTTOM] = table[TOP] + np.diff(starts, append=ends[-1]) // row_bytes
        return Parts(table), starts

    def split(self, limit: int) -> Parts:
        """No part above `limit` bytes: whole rows, or parts of a row where one is longer than that."""
        if not len(self) or self.num_bytes.max() <= limit:
            return self
        most = limit // self.table[ITEMSIZE]
        columns = self.table[RIGHT] - self.table[LEFT]
        large = self.num_bytes > limit
        width = np.where(large, np.minimum(columns, most), columns)
        height = np.where(large, np.maximum(most // width, 1), self.rows)
        across = -(-columns // width)
        count = across * -(-self.rows // height)
        whole = np.repeat(np.arange(len(self)), count)
        number = np.arange(len(whole)) - np.repeat(np.cumsum(count) - count, count)
        table = self.table[:, whole]
        down, right = np.divmod(number, across[whole])
        table[TOP] += down * height[whole]
        table[BOTTOM] = np.minimum(table[TOP] + height[whole], table[BOTTOM])
        table[LEFT] += right * width[whole]
        table[RIGHT] = np.minimum(table[LEFT] + width[whole], table[RIGHT])
        return Parts(table)

    @staticmethod
    def joined(several: Iterable[Parts]) -> Parts:
        return Parts(np.concatenate([parts.table for parts in several], axis=1))


Count = TypeVar("Count", int, Numbers)


def aligned(num_bytes: Count) -> Count:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def ranges(starts: Numbers, counts: Numbers) -> Numbers:
    """start, start + 1, ... of each, `count` numbers of it."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
