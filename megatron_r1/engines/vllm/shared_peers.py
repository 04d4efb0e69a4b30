"""Weights through the host's memory (rollout.sync ipc): each trainer rank packs where workers read. vLLM is not
imported.

A rank's buffers are a file in /dev/shm that the workers that it sends to map; it has no name any more once they have,
so a crash later leaves nothing behind. What one before then has left, the next rank removes. A worker copies from there
into its parameters, on a CPU or on the GPU that the rank uses too, and nothing is copied in between. What travels over
gloo is where a part begins, and that it was taken.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_r1.engines.vllm.peers import IN_FLIGHT, Arrival, GlooPeers, Meeting, Part, call_all
from megatron_r1.engines.vllm.process_group import SHARED_MEMORY
from megatron_r1.errors import EngineError

ALIGNMENT_BYTES = 64
"""Of a buffer's begin, so that numbers of any dtype can lie there."""


class NoRoomError(EngineError):
    """The shared memory has no room for a rank's buffers: says how much is needed, and how much there is."""


class SharedMemoryPeers(GlooPeers):
    """Meets as GlooPeers does."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(meeting, rank)
        self._memory: dict[int, torch.Tensor] = {}
        """By member: what it packs into, u8. On a trainer rank its own, on a worker those that it receives from."""
        self._told: list[Callable[[], None]] = []
        """A worker's words that parts were taken."""

    def prepare(self, num_bytes: int, *, to: Sequence[int], of: Sequence[int]) -> None:
        """NoRoomError if the shared memory has no room."""
        if to:
            path, size = self._path_of(self.rank), IN_FLIGHT * -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            remove_left_over(older_than_seconds=2 * self.meeting.timeout_seconds)
            allocate(path, size)
            try:
                self._memory[self.rank] = map_memory(path, size)
                for member in to:
                    self.send_numbers(torch.tensor([[size]]), member)
                for member in to:
                    self.receive_numbers(member)
            finally:
                path.unlink()  # all have it open
        for member in of:
            size = int(self.receive_numbers(member))
            self._memory[member] = map_memory(self._path_of(member), size)
            self.send_numbers(torch.tensor([[size]]), member)

    def outbox(self, num_bytes: int) -> list[torch.Tensor]:
        memory = self._memory.get(self.rank)
        if memory is None:
            return [torch.empty(0, dtype=torch.uint8) for _ in range(IN_FLIGHT)]
        size = memory.numel() // IN_FLIGHT
        return [memory[slot * size : slot * size + num_bytes] for slot in range(IN_FLIGHT)]

    def inbox(self, num_bytes: int) -> list[torch.Tensor]:
        """Nothing is received into them: they only say how much is awaited."""
        return [torch.empty(num_bytes, dtype=torch.uint8, device="meta") for _ in range(IN_FLIGHT)]

    def send(self, parts: Sequence[Part], number: int) -> Callable[[], None]:
        self._members()
        memory, waits, words = self._memory[self.rank], [], []
        for to, buffer in parts:
            begin = torch.tensor([buffer.data_ptr() - memory.data_ptr()])
            answer = torch.empty(1, dtype=torch.uint8)
            words += [begin, answer]  # they must stay until they have gone, or come
            waits.append(self._send(begin.view(torch.uint8), to, number))
            waits.append(self._receive(answer, to, number))

        def settled() -> None:
            call_all(waits)
            words.clear()

        return settled

    def receive(self, parts: Sequence[Part], number: int) -> list[Arrival]:
        def arrival(of: int, num_bytes: int) -> Arrival:
            begin = torch.empty(1, dtype=torch.int64)
            come = self._receive(begin.view(torch.uint8), of, number)

            def arrived() -> torch.Tensor:
                come()
                return self._memory[of][int(begin) : int(begin) + num_bytes]

            return arrived

        return [arrival(of, buffer.numel()) for of, buffer in parts]

    def taken(self, parts: Sequence[Part], number: int) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the copies out of the sender's memory
        self._told += [self._send(ANSWER, of, number) for of, _ in parts]

    def finish(self, given_up: Callable[[], bool]) -> None:
        del given_up
        call_all(self._told)

    def close(self) -> None:
        super().close()
        for memory in self._memory.values():
            unpin(memory)
        self._memory = {}

    def _path_of(self, member: int) -> Path:
        return SHARED_MEMORY / f"{PREFIX}{Path(self.meeting.place).name}-{member}"


ANSWER = torch.ones(1, dtype=torch.uint8)
PREFIX = "mr1-weights-"


def remove_left_over(older_than_seconds: float) -> None:
    """This user's files whose ranks were killed before they had taken the name away: no meeting lasts so long."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else removes it too
            found = path.stat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > older_than_seconds:
                path.unlink()


def allocate(path: Path, num_bytes: int) -> None:
    """A new file of that size, of this user alone. NoRoomError if its folder has no room."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Without this a full file system would kill a process by SIGBUS in the middle of a copy.
        os.posix_fallocate(handle, 0, max(1, num_bytes))
    except OSError as error:
        path.unlink()
        if error.errno not in (errno.ENOSPC, errno.EFBIG):
            raise
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        raise NoRoomError(
            f"rollout.sync ipc needs {num_bytes / 2**20:,.0f} MiB in {path.parent} for this rank, which has "
            f"{free / 2**20:,.0f}: give the container more shared memory (docker --shm-size), or lower "
            "rollout.sync_bucket_mib"
        ) from error
    finally:
        os.close(handle)


def map_memory(path: Path, num_bytes: int) -> torch.Tensor:
    """The file's bytes, u8, shared with every process that maps it. FileNotFoundError where there is none. On a machine
    with GPUs they are page-locked, which makes copies to and from them faster; where that is refused, it works
    without."""
    try:
        opened = path.open("r+b")
    except FileNotFoundError as error:
        needed = "is not here; with rollout.sync ipc trainer and servers must share /dev/shm (containers: docker --ipc)"
        raise FileNotFoundError(error.errno, f"weight sync: the trainer's memory {needed}", str(path)) from None
    with opened as file:  # torch.from_file would make one that is not there, and nobody would remove it
        buffer = torch.frombuffer(mmap.mmap(file.fileno(), max(1, num_bytes)), dtype=torch.uint8)
    if torch.cuda.is_initialized() and int(_cuda_runtime().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)):
        _forget_error()
        _PAGED.add(buffer.data_ptr())
    return buffer


def unpin(buffer: torch.Tensor) -> None:
    """Undo map_memory's page-locking, before the memory goes."""
    if buffer.data_ptr() in _PAGED:
        _PAGED.remove(buffer.data_ptr())
    elif torch.cuda.is_initialized() and int(_cuda_runtime().cudaHostUnregister(buffer.data_ptr())):
        _forget_error()


_PAGED: set[int] = set()
"""Addresses of mapped memory that CUDA did not take."""


def _forget_error() -> None:
    """CUDA keeps the last error, and torch would raise it at its next kernel: let this one raise."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()
