"""Boxes: rectangular parts of a tensor with rows and columns. A vector is one column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def size(self) -> int:
        """Numbers in it."""
        return (self.bottom - self.top) * (self.right - self.left)

    def meet(self, other: Box) -> Box | None:
        """What both hold; None if that is nothing."""
        top, bottom = max(self[0], other[0]), min(self[1], other[1])
        left, right = max(self[2], other[2]), min(self[3], other[3])
        return Box(top, bottom, left, right) if top < bottom and left < right else None

    def cut(self, rows: int) -> tuple[Box, Box]:
        """Its first `rows` rows, and the others."""
        middle = self.top + rows
        return Box(self.top, middle, self.left, self.right), Box(middle, self.bottom, self.left, self.right)


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor of `shape`, at most two dimensions. ValueError for more."""
    if len(shape) > 2:
        raise ValueError(f"a tensor of shape {list(shape)} has more than rows and columns")
    rows, columns = (*shape, 1, 1)[:2]
    return Box(0, rows, 0, columns)


def parts(box: Box, limit: int) -> Iterator[Box]:
    """`box` in parts of at most `limit` numbers: whole rows, or parts of a row where one is longer than that."""
    if box.size <= limit:
        yield box
        return
    width = min(box.columns, limit)
    height = max(limit // width, 1)
    for top in range(box.top, box.bottom, height):
        for left in range(box.left, box.right, width):
            yield Box(top, min(top + height, box.bottom), left, min(left + width, box.right))
