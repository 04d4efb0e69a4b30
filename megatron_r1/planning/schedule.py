"""The 1F1B schedule, event by event: when each pipeline rank runs which microbatch forward and backward.

Ranks may differ in speed (a first stage of dense layers, a last one with the head), which the closed formula of
trainer.py takes for the slowest. Left out: virtual stages, and the time of the messages between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slot:
    """Seconds from the schedule's start."""

    rank: int
    microbatch: int
    forward: bool
    start: float
    end: float


def one_forward_one_backward(forward: Sequence[float], backward: Sequence[float], microbatches: int) -> list[Slot]:
    """Slots of `microbatches` through ranks whose passes take `forward[r]` and `backward[r]` seconds.

    Rank r of p warms up with min(p - r - 1, m) forward passes, then alternates, then drains (arXiv 2104.04473)."""
    ranks = len(forward)
    orders = [_order(rank, ranks, microbatches) for rank in range(ranks)]
    ends: dict[tuple[int, int, bool], float] = {}
    free = [0.0] * ranks
    place = [0] * ranks
    slots: list[Slot] = []
    while len(slots) < 2 * ranks * microbatches:
        for rank in range(ranks):
            while place[rank] < len(orders[rank]):
                number, is_forward = orders[rank][place[rank]]
                ready = _ready(ends, rank, ranks, number, is_forward)
                if ready is None:
                    break
                start = max(free[rank], ready)
                end = start + (forward[rank] if is_forward else backward[rank])
                ends[rank, number, is_forward] = free[rank] = end
                slots.append(Slot(rank, number, is_forward, start, end))
                place[rank] += 1
    return slots


def _order(rank: int, ranks: int, count: int) -> list[tuple[int, bool]]:
    warm = min(ranks - rank - 1, count)
    order = [(number, True) for number in range(warm)]
    for number in range(count - warm):
        order += [(warm + number, True), (number, False)]
    return order + [(number, False) for number in range(count - warm, count)]


def _ready(
    ends: dict[tuple[int, int, bool], float], rank: int, ranks: int, number: int, is_forward: bool
) -> float | None:
    """When the input of a pass is there; None if it is not known yet."""
    if is_forward:
        return 0.0 if rank == 0 else ends.get((rank - 1, number, True))
    own = ends.get((rank, number, True))
    if rank == ranks - 1 or own is None:
        return own
    return ends.get((rank + 1, number, False))
