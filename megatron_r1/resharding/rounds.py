"""The order of what is sent: numbered rounds, in each of which a rank or a worker has at most so many bytes on the way.

Every rank and worker goes through the rounds it has a part in, in their order, two at a time at most. That cannot
stop: of all that is not done, the round with the lowest number has both sides at it. None waits for a round that it
has no part in.

A server takes a layer at a time, so that it holds little beside the model. Layers of different pipeline stages are held
by different ranks: each server begins with another stage, and goes through as many stages in turns as it needs for all
ranks to have somebody to send to. Where a stage has fewer ranks than the server workers, it takes layers of several
stages at once: otherwise the ranks of one stage could not keep the workers' links busy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_r1.resharding.parts import Numbers, Parts, aligned

Name = TypeVar("Name")


def layer_order(
    layers: Mapping[Name, Collection[int]], server: int, servers: int, workers: int
) -> Iterator[tuple[Name, ...]]:
    """`layers` (name -> the ranks that hold it) in the order in which server `server` of `servers`, of `workers`
    workers, takes them, those together that it takes at once."""
    stages: dict[Collection[int], list[Name]] = {}
    for layer, holders in layers.items():
        stages.setdefault(holders, []).append(layer)
    queues = list(stages.values())
    first = server * len(queues) // servers
    queues = queues[first:] + queues[:first]
    share = -(-len(queues) // servers)
    at_once = -(-workers // max(1, min(map(len, stages))))  # as many ranks as workers
    for start in range(0, len(queues), share):
        for level in zip_longest(*queues[start : start + share]):
            present = [layer for layer in level if layer is not None]
            yield from (tuple(present[i : i + at_once]) for i in range(0, len(present), at_once))


def alike(layers: Iterable[Name | None]) -> dict[Name, list[int]]:
    """What servers take now -> those that do."""
    taking: dict[Name, list[int]] = {}
    for server, name in enumerate(layers):
        if name is not None:
            taking.setdefault(name, []).append(server)
    return taking


class Chunks(NamedTuple):
    """Consecutive parts that go together, from `start` up to `stop`, of one sender and worker: int64[chunks] each."""

    start: Numbers
    stop: Numbers
    sender: Numbers
    worker: Numbers
    num_bytes: Numbers


def chunks_in_turns(parts: Parts, limit: int) -> tuple[Parts, Chunks]:
    """`parts` in another order, and chunks of it, of about a quarter of `limit` bytes and never more than `limit`, in
    the order of sending: senders begin with different workers, and go round them chunk by chunk."""
    parts, begins = _flows_in_turns(parts)
    sizes = aligned(parts.num_bytes)
    before = np.cumsum(sizes) - sizes
    filled = (before - before[_latest(begins)]) // (limit // 4)
    large = sizes > limit // 4
    start = np.flatnonzero(begins | (np.diff(filled, prepend=0) != 0) | large | np.append(False, large[:-1]))
    sender = parts.sender[start]
    chunks = Chunks(start, np.append(start[1:], len(parts)), sender, parts.worker[start], np.add.reduceat(sizes, start))
    numbers = np.arange(len(start))
    of_worker = numbers - _latest(begins[start])
    order = np.lexsort((numbers, of_worker, sender))
    of_sender = numbers - np.searchsorted(sender[order], sender[order])
    order = order[np.lexsort((sender[order], of_sender))]
    return parts, Chunks(*(column[order] for column in chunks))


def _flows_in_turns(parts: Parts) -> tuple[Parts, npt.NDArray[np.bool_]]:
    """`parts` by sender and, from another one on for each sender, by worker; and where a sender or worker begins."""
    workers = int(parts.worker.max()) + 1
    flow_of_part = parts.sender * workers + parts.worker
    used = np.zeros(int(flow_of_part.max()) + 1, bool)
    used[flow_of_part] = True
    flows = np.flatnonzero(used)
    _, first, count = np.unique(flows // workers, return_index=True, return_counts=True)
    sender = np.repeat(np.arange(len(first)), count)
    turn = (np.arange(len(flows)) - first[sender] - sender) % count[sender]
    place = np.zeros(len(used), np.int32)
    place[flows[np.lexsort((turn, sender))]] = np.arange(len(flows))
    place_of_part = place[flow_of_part]
    order = np.argsort(place_of_part, kind="stable")
    return parts.take(order), np.diff(place_of_part[order], prepend=-1) != 0


def _latest(begins: npt.NDArray[np.bool_]) -> Numbers:
    """For each place the latest one, up to it, where something begins."""
    return np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))


class Rounds:
    """Gives each chunk its round: never before the last one of its sender or its worker, and where both have room."""

    def __init__(self, limit: int, senders: int, workers: int) -> None:
        """`limit`: bytes of a round at a rank or worker."""
        self.limit = limit
        self._last = [0] * senders, [0] * workers
        self._filled = [0] * senders, [0] * workers

    def place(self, chunks: Chunks) -> Numbers:
        """The number of each one's round. None has more bytes than the limit."""
        (sent, received), (sent_bytes, received_bytes), limit = self._last, self._filled, self.limit
        numbers = []
        for sender, worker, size in zip(
            chunks.sender.tolist(), chunks.worker.tolist(), chunks.num_bytes.tolist(), strict=True
        ):
            number = max(sent[sender], received[worker])
            out = sent_bytes[sender] if sent[sender] == number else 0
            into = received_bytes[worker] if received[worker] == number else 0
            if out + size > limit or into + size > limit:
                number, out, into = number + 1, 0, 0
            sent[sender] = received[worker] = number
            sent_bytes[sender], received_bytes[worker] = out + size, into + size
            numbers.append(number)
        return np.array(numbers, np.int64)
