"""Which of the ranks that hold the same part sends it: so that the busiest sends as little as it can.

Demand that any of several ranks can serve is poured like water: the ranks that send least take it first, until all
have the same (or the demand ends). A demand is a line of parts in a fixed order, cut where one rank's share ends and
the next one's begins, so a rank's share goes to few workers, and several servers are fed by different replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_r1.resharding.boxes import Box

GRAIN_BYTES = 64 << 10
"""No cut leaves less than about this on either side: a message costs more than that many bytes."""


class Part(NamedTuple):
    """What lies in the way from holders to a worker: `box` of `tensor`, wanted by `worker` as its want number
    `want`."""

    worker: int
    want: int
    tensor: int
    box: Box
    itemsize: int

    @property
    def num_bytes(self) -> int:
        return self.box.size * self.itemsize


def shares(loads: Sequence[int], demand: int) -> list[int]:
    """Of `demand` bytes, those of each rank, which has `loads[i]` to send already: the highest sum is least.

    The level l solves sum(max(0, l - loads)) = demand."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    level, filled = 0, 0
    for position, index in enumerate(order):
        filled += loads[index]
        level = -(-(demand + filled) // (position + 1))
        if position + 1 == len(order) or level <= loads[order[position + 1]]:
            break
    given, rest = [0] * len(loads), demand
    for index in order:
        given[index] = min(max(level - loads[index], 0), rest)
        rest -= given[index]
    return given


def spread(
    line: Sequence[Part], ranks: Sequence[int], loads: dict[int, int], grain: int = GRAIN_BYTES
) -> Iterator[tuple[int, Part]]:
    """(sender, part) for all of `line`, which each of `ranks` holds. Adds what they send to `loads`, bytes per rank."""
    demand = sum(part.num_bytes for part in line)
    if len(ranks) == 1 or demand <= grain:
        chosen = min(ranks, key=lambda rank: (loads.get(rank, 0), rank))
        loads[chosen] = loads.get(chosen, 0) + demand
        yield from ((chosen, part) for part in line)
        return
    given = shares([loads.get(rank, 0) for rank in ranks], demand)
    queue = [(rank, amount) for rank, amount in zip(ranks, given, strict=True) if amount]
    position, (rank, room) = 0, queue[0]
    for part in line:
        rest: Part | None = part
        while rest is not None:
            last = position + 1 == len(queue)
            if last or rest.num_bytes <= room + grain // 2:
                taken, rest = rest, None
            else:
                rows = room // (rest.box.columns * rest.itemsize)
                taken, rest = _cut(rest, rows) if room >= grain // 2 and 0 < rows < rest.box.rows else (None, rest)
            if taken is not None:
                room -= taken.num_bytes
                loads[rank] = loads.get(rank, 0) + taken.num_bytes
                yield rank, taken
            if not last and (rest is not None or room <= 0):
                position += 1
                rank, amount = queue[position]
                room += amount  # what the last one gave too little or too much


def _cut(part: Part, rows: int) -> tuple[Part, Part]:
    first, second = part.box.cut(rows)
    return part._replace(box=first), part._replace(box=second)
