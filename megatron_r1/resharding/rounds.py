"""The order of what is sent: numbered rounds, in each of which a rank or a worker has at most so many bytes on the way.

Every rank and worker goes through the rounds it has a part in, in their order, two at a time at most. That cannot
stop: of all that is not done, the round with the lowest number has both sides at it. None waits for a round that it
has no part in.

A server takes a layer at a time, so that it holds little beside the model. Layers of different pipeline stages are held
by different ranks: each server begins with another stage, and takes from as many stages at once as it needs for all to
have somebody to send to.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

Name = TypeVar("Name")


def interleave(queues: Iterable[Sequence[Name]]) -> Iterator[Name]:
    """First of each, second of each, and so on."""
    missing = object()
    for names in zip_longest(*queues, fillvalue=missing):
        yield from (name for name in names if name is not missing)  # type: ignore[misc]


def layer_order(layers: Mapping[Name, Hashable], server: int, servers: int) -> list[Name]:
    """`layers` (name -> who holds it) in the order in which server `server` of `servers` takes them."""
    stages: dict[Hashable, list[Name]] = {}
    for layer, holders in layers.items():
        stages.setdefault(holders, []).append(layer)
    at_once = -(-len(stages) // servers)
    queues = list(stages.values())
    first = server * len(queues) // servers
    queues = queues[first:] + queues[:first]
    ordered: list[Name] = []
    for start in range(0, len(queues), at_once):
        ordered += interleave(queues[start : start + at_once])
    return ordered


class Rounds:
    """Gives each transfer its round: never before the last one of its sender or its worker, and where both have
    room."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of a round at a rank or worker."""
        self.limit = limit
        self._last: dict[Hashable, int] = {}
        self._filled: dict[Hashable, int] = {}

    def place(self, sender: Hashable, worker: Hashable, num_bytes: int) -> int:
        """The number of the round. `num_bytes` is at most the limit."""
        ends = (sender, worker)
        number = max(self._last.get(end, 0) for end in ends)
        if any(self._filled_in(end, number) + num_bytes > self.limit for end in ends):
            number += 1
        for end in ends:
            self._filled[end] = self._filled_in(end, number) + num_bytes
            self._last[end] = number
        return number

    def _filled_in(self, end: Hashable, number: int) -> int:
        return self._filled.get(end, 0) if self._last.get(end, 0) == number else 0
