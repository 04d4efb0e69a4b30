"""The group of all trainer ranks and all vLLM workers, in which weights go from one to one. vLLM is not imported.

`rollout.sync` names the way that bytes take in it: gloo's sockets (here), the host's memory (shared_peers.py) or NCCL
(nccl_peers.py). No default process group is touched, so the trainer's own torch.distributed is free. The trainer's
ranks come first, then the workers, one server's after another's.
"""

# torch's stubs lack the gloo backend's methods.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed

from megatron_r1.errors import EngineError

LOOPBACK = "127.0.0.1"
NUMBERS_TAG = 1 << 30
"""Beside the tags of messages, which are their rounds."""
IN_FLIGHT = 2
"""Rounds that a rank or worker has on the way: one is packed (or unpacked) while the other travels."""

SyncWay = Literal["gloo", "ipc", "nccl"]
"""rollout.sync."""
Part = tuple[int, torch.Tensor]
"""(another member, u8[bytes] of a buffer): what goes to it, or comes from it, in a round."""
Arrival = Callable[[], torch.Tensor]
"""Waits for a part and returns its bytes, u8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What every member of a group must agree on. `place`: for gloo and ipc a file in a 0700 folder, for nccl the
    communicator's identifier (base64), which only who has a server's token is told."""

    sync: SyncWay
    place: str
    trainers: int
    workers: int
    timeout_seconds: float

    @property
    def size(self) -> int:
        return self.trainers + self.workers

    def as_info(self) -> dict[str, object]:
        return asdict(self)


class Peers(Protocol):
    """Membership of one process in a group. RuntimeError when another member is gone.

    `close` ends the connections, which releases peers that wait for this one. Rounds are sent and received in their
    order; a buffer of `outbox` or `inbox` belongs to a round until what `send` returned has been called, or `taken`.
    """

    meeting: Meeting

    def send_numbers(self, numbers: torch.Tensor, to: int) -> None:
        """int64[n, m] on the host, either of which may be 0."""
        ...

    def receive_numbers(self, of: int) -> torch.Tensor: ...

    def prepare(self, num_bytes: int, *, to: Sequence[int], of: Sequence[int]) -> None:
        """Once, before the first round: `num_bytes` is the most that this member sends in one, `to` and `of` are whom
        it will send to and receive from. Both sides of every pair call it."""
        ...

    def outbox(self, num_bytes: int) -> list[torch.Tensor]:
        """IN_FLIGHT buffers, u8, to send from; at most as large as was prepared."""
        ...

    def inbox(self, num_bytes: int) -> list[torch.Tensor]:
        """IN_FLIGHT buffers to receive into."""
        ...

    def send(self, parts: Sequence[Part], number: int) -> Callable[[], None]:
        """Begin to send round `number`; the result waits until its buffer may be filled again."""
        ...

    def receive(self, parts: Sequence[Part], number: int) -> list[Arrival]:
        """Begin to receive round `number`; an arrival gives the bytes where they lie, in the inbox or elsewhere."""
        ...

    def taken(self, parts: Sequence[Part], number: int) -> None:
        """What came in round `number` has been used."""
        ...

    def finish(self, given_up: Callable[[], bool]) -> None:
        """Wait until all that was sent or taken is done; RuntimeError if it is not in time, or `given_up` is true."""
        ...

    def close(self) -> None:
        """Leave the group. Safe to call twice."""
        ...


def check_place(meeting: Meeting) -> None:
    """EngineError where this process cannot enter the group at all; before others begin to wait for it."""
    folder = Path(meeting.place).parent
    if meeting.sync != "nccl" and not folder.is_dir():
        raise EngineError(
            f"weight sync: {folder} is not here; with rollout.sync {meeting.sync} trainer and servers must share one "
            "machine (nccl goes between machines)"
        )


def join(meeting: Meeting, rank: int, device: torch.device) -> Peers:
    """Enter the group as member `rank`, with buffers on `device`; blocks until all members have entered. RuntimeError
    if they do not come in time."""
    if meeting.sync == "nccl":
        from megatron_r1.engines.vllm.nccl_peers import NcclPeers

        return NcclPeers(meeting, rank, device)
    if meeting.sync == "ipc":
        from megatron_r1.engines.vllm.shared_peers import SharedMemoryPeers

        return SharedMemoryPeers(meeting, rank)
    return GlooPeers(meeting, rank)


class GlooPeers:
    """Over loopback's sockets: trainer and servers share a host. Members meet through a file (no TCP store).

    Nobody but this object may hold the process group or what it has begun, because a reference kept by a traceback
    would keep its connections open.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank
        check_place(meeting)
        store = torch.distributed.FileStore(meeting.place, meeting.size)
        timeout = timedelta(seconds=meeting.timeout_seconds)
        store.set_timeout(timeout)
        options = torch.distributed.ProcessGroupGloo._Options()
        options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = timeout
        options._threads = 1
        self._group: torch.distributed.ProcessGroupGloo | None = torch.distributed.ProcessGroupGloo(
            store, rank, meeting.size, options
        )
        self._begun: dict[int, torch.distributed.Work] = {}
        """Sends and receives that nobody has waited for, by number."""
        self._numbers = itertools.count()

    def send_numbers(self, numbers: torch.Tensor, to: int) -> None:
        for part in (torch.tensor(numbers.shape), numbers.contiguous()):
            if part.numel():
                self._send(part.view(torch.uint8).flatten(), to, NUMBERS_TAG)()

    def receive_numbers(self, of: int) -> torch.Tensor:
        shape = torch.empty(2, dtype=torch.int64)
        self._receive(shape.view(torch.uint8), of, NUMBERS_TAG)()
        numbers = torch.empty(tuple(shape.tolist()), dtype=torch.int64)
        if numbers.numel():
            self._receive(numbers.view(torch.uint8).flatten(), of, NUMBERS_TAG)()
        return numbers

    def prepare(self, num_bytes: int, *, to: Sequence[int], of: Sequence[int]) -> None:
        del num_bytes, to, of  # buffers are the update's own

    def outbox(self, num_bytes: int) -> list[torch.Tensor]:
        return [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(IN_FLIGHT)]

    inbox = outbox

    def send(self, parts: Sequence[Part], number: int) -> Callable[[], None]:
        gone = [self._send(buffer, to, number) for to, buffer in parts]
        return lambda: call_all(gone)

    def receive(self, parts: Sequence[Part], number: int) -> list[Arrival]:
        def arrival(buffer: torch.Tensor, come: Callable[[], None]) -> Arrival:
            def arrived() -> torch.Tensor:
                come()
                return buffer

            return arrived

        return [arrival(buffer, self._receive(buffer, of, number)) for of, buffer in parts]

    def taken(self, parts: Sequence[Part], number: int) -> None:
        del parts, number  # the buffer is this member's own

    def finish(self, given_up: Callable[[], bool]) -> None:
        del given_up  # a member that gives up closes its connections

    def close(self) -> None:
        self._group = None
        self._begun.clear()

    def _send(self, buffer: torch.Tensor, to: int, tag: int) -> Callable[[], None]:
        return self._begin(lambda group: group.send([buffer], to, tag))

    def _receive(self, buffer: torch.Tensor, of: int, tag: int) -> Callable[[], None]:
        return self._begin(lambda group: group.recv([buffer], of, tag))

    def _begin(
        self, call: Callable[[torch.distributed.ProcessGroupGloo], torch.distributed.Work]
    ) -> Callable[[], None]:
        """Begin a send or receive; the result waits for it, once. It holds nothing of the group."""
        number = next(self._numbers)
        self._begun[number] = call(self._members())

        def done() -> None:
            self._members()
            self._begun.pop(number).wait()

        return done

    def _members(self) -> torch.distributed.ProcessGroupGloo:
        if self._group is None:
            raise RuntimeError("weight sync: this member has left its group")
        return self._group


def call_all(waits: list[Callable[[], None]]) -> None:
    while waits:
        waits.pop(0)()
