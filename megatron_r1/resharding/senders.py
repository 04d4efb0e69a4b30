"""Which of the ranks that hold the same part sends it: so that the busiest sends as little as it can.

Demand that any of several ranks can serve is poured like water: the ranks that send least take it first, until all
have the same (or the demand ends). A demand is a line of parts in a fixed order, cut where one rank's share ends and
the next one's begins, so a rank's share goes to few workers, and several servers are fed by different replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from megatron_r1.resharding.parts import Numbers, Parts

GRAIN_BYTES = 64 << 10
"""No cut leaves less than about this on either side: a message costs more than that many bytes."""


class Holders:
    """The sets of ranks that hold the same, numbered: smaller ones first."""

    def __init__(self, sets: Iterable[tuple[int, ...]]) -> None:
        ordered = sorted(set(sets), key=lambda ranks: (len(ranks), ranks))
        self.ranks = [np.array(ranks, np.int64) for ranks in ordered]
        self.number: Mapping[tuple[int, ...], int] = {ranks: number for number, ranks in enumerate(ordered)}
        self.alone = np.array([ranks[0] for ranks in ordered if len(ranks) == 1], np.int64)
        """The rank of each set of one: those have the lowest numbers."""
        self.loads = np.zeros(1 + max((rank for ranks in ordered for rank in ranks), default=0), np.int64)
        """Bytes that each rank has to send so far."""

    def choose(self, parts: Parts, grain: int) -> Parts:
        """`parts` with a sender each, some of them cut; the loads grow by what they send."""
        parts = parts.take(np.argsort(parts.holders, kind="stable"))
        single = int(np.searchsorted(parts.holders, len(self.alone)))
        first = parts.take(slice(0, single))
        first.sender[:] = self.alone[first.holders]
        np.add.at(self.loads, first.sender, first.num_bytes)
        numbers, counts = np.unique(parts.holders[single:], return_counts=True)
        ends = single + np.cumsum(counts)
        lines = [
            self._spread(parts.take(slice(end - count, end)), self.ranks[number], grain)
            for number, count, end in zip(numbers, counts, ends, strict=True)
        ]
        return Parts.joined([first, *lines])

    def _spread(self, line: Parts, ranks: Numbers, grain: int) -> Parts:
        """All of `line`, which each of `ranks` holds."""
        sizes = line.num_bytes
        ends = np.cumsum(sizes)
        demand = int(ends[-1])
        if demand <= grain:
            line.sender[:] = chosen = ranks[np.argmin(self.loads[ranks])]
            self.loads[chosen] += demand
            return line
        wanted = np.cumsum(shares(self.loads[ranks], demand))[:-1]
        at = np.minimum(np.searchsorted(ends, wanted, side="right"), len(line) - 1)
        begins = (ends - sizes)[at]
        cuts = begins + _inside(wanted - begins, sizes[at], line.row_bytes[at], grain)
        line, starts = line.cut(cuts)
        line.sender[:] = ranks[np.searchsorted(cuts, starts, side="right")]
        np.add.at(self.loads, line.sender, line.num_bytes)
        return line


def shares(loads: Numbers, demand: int) -> Numbers:
    """Of `demand` bytes, those of each rank, which has `loads[i]` to send already: the highest sum is least.

    The level l solves sum(max(0, l - loads)) = demand."""
    order = np.argsort(loads, kind="stable")
    ordered = loads[order]
    levels = -(-(demand + np.cumsum(ordered)) // np.arange(1, len(loads) + 1))
    enough = np.append(levels[:-1] <= ordered[1:], True)
    filled = np.cumsum(np.maximum(levels[np.argmax(enough)] - ordered, 0))
    given = np.empty_like(loads)
    given[order] = np.diff(np.minimum(filled, demand), prepend=0)  # the level is rounded up
    return given


def _inside(wanted: Numbers, size: Numbers, row_bytes: Numbers, grain: int) -> Numbers:
    """Where parts of `size` bytes are cut instead of at byte `wanted`: at whole rows, and not near their ends."""
    rows = (wanted + row_bytes // 2) // row_bytes * row_bytes
    near = (rows < grain // 2) | (size - rows < grain // 2)
    return np.where(near, np.where(2 * wanted < size, 0, size), rows)
