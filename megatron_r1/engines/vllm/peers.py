"""The group of all trainer ranks and all vLLM workers, in which weights go from one to one. vLLM is not imported.

No default process group is touched, so the trainer's own torch.distributed is free. Members meet through a file in a
0700 folder (no TCP store) and gloo listens on loopback only; trainer and servers share a host. The trainer's ranks come
first, then the workers, one server's after another's.
"""

# torch's stubs lack the gloo backend's methods.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed

LOOPBACK = "127.0.0.1"
NUMBERS_TAG = 1 << 30
"""Beside the tags of messages, which are their rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What every member of a group must agree on."""

    store_path: str
    trainers: int
    workers: int
    timeout_seconds: float

    @property
    def size(self) -> int:
        return self.trainers + self.workers

    def as_info(self) -> dict[str, object]:
        return asdict(self)


class Peers:
    """Membership of one process in a group.

    `close` really ends the connections, which releases peers that wait for this one: nobody but this object may hold
    the process group, because a reference kept by a traceback would keep them open.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:
        """Enter the group; blocks until all members have. RuntimeError if they do not come in time."""
        self.meeting, self.rank = meeting, rank
        store = torch.distributed.FileStore(meeting.store_path, meeting.size)
        timeout = timedelta(seconds=meeting.timeout_seconds)
        store.set_timeout(timeout)
        options = torch.distributed.ProcessGroupGloo._Options()
        options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = timeout
        options._threads = 1
        self._group: torch.distributed.ProcessGroupGloo | None = torch.distributed.ProcessGroupGloo(
            store, rank, meeting.size, options
        )

    def send(self, buffer: torch.Tensor, to: int, tag: int) -> torch.distributed.Work:
        """Begin to send `buffer`, u8[bytes], which must stay as it is until the work is done."""
        return self._members().send([buffer], to, tag)

    def receive(self, buffer: torch.Tensor, of: int, tag: int) -> torch.distributed.Work:
        """Begin to receive into `buffer`, u8[bytes]."""
        return self._members().recv([buffer], of, tag)

    def send_numbers(self, numbers: torch.Tensor, to: int) -> None:
        """int64[n, m], either of which may be 0."""
        for part in (torch.tensor(numbers.shape), numbers.contiguous()):
            if part.numel():
                self.send(part.view(torch.uint8).flatten(), to, NUMBERS_TAG).wait()

    def receive_numbers(self, of: int) -> torch.Tensor:
        """int64[n, m] of `send_numbers`."""
        shape = torch.empty(2, dtype=torch.int64)
        self.receive(shape.view(torch.uint8), of, NUMBERS_TAG).wait()
        numbers = torch.empty(tuple(shape.tolist()), dtype=torch.int64)
        if numbers.numel():
            self.receive(numbers.view(torch.uint8).flatten(), of, NUMBERS_TAG).wait()
        return numbers

    def _members(self) -> torch.distributed.ProcessGroupGloo:
        if self._group is None:
            raise RuntimeError("weight sync: this member has left its group")
        return self._group

    def close(self) -> None:
        self._group = None
