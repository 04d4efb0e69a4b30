"""Weights over NCCL (rollout.sync nccl), to GPUs of their own, on any machine: vLLM's communicator.

Rank 0 makes the communicator's identifier, workers hear it over their server's HTTP route, with its token. A round is
one group of NCCL calls, on a stream of its own; the caller's stream and it wait for each other, the host for neither
until `finish`. NCCL says nothing of a member that has died, so there is a deadline, after which it is aborted.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch

from megatron_r1.engines.vllm.peers import IN_FLIGHT, Arrival, Meeting, Part

POLL_SECONDS, LOOK_SECONDS = 0.002, 0.25
"""How often the GPU is asked whether it is done, and whether another member has given up."""


def new_identifier() -> str:
    """A communicator's, for Meeting.place. RuntimeError where the NCCL library is not found."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()


def communicator_of(meeting: Meeting, rank: int, device: torch.device) -> Any:
    """vLLM's, whose members must share no GPU."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.utils.nccl import unpinned_nccl_env

    def meet() -> Any:
        return PyNcclCommunicator.from_unique_id_bytes(
            base64.b64decode(meeting.place), rank=rank, world_size=meeting.size, device=device
        )

    with unpinned_nccl_env():  # vLLM's workers pin NCCL variables that the trainer does not have
        made = within(meeting.timeout_seconds, meet)
    if made.disabled:
        raise RuntimeError("weight sync: vLLM's NCCL is off here (VLLM_DISABLE_PYNCCL); rollout.sync nccl needs it")
    return made


def within(seconds: float, meet: Callable[[], Any]) -> Any:
    """What `meet` returns. RuntimeError if it has not returned by then: NCCL waits for ever for a member that has died
    before it came, and cannot be told to stop, so `meet` goes on, on a thread that holds up nothing."""
    met = Future[Any]()

    def work() -> None:
        try:
            met.set_result(meet())
        except BaseException as error:
            met.set_exception(error)

    threading.Thread(target=work, name="nccl-meeting", daemon=True).start()
    if not wait([met], timeout=seconds).done:
        raise RuntimeError(f"weight sync: not all members have entered the NCCL communicator in {seconds:.0f} s")
    return met.result()


class NcclPeers:
    """`communicator` has vLLM's PyNcclCommunicator's send, recv, group_start, group_end and destroy."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, communicator: Any = None) -> None:
        self.meeting, self.device = meeting, device
        self._communicator: Any = communicator or communicator_of(meeting, rank, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send_numbers(self, numbers: torch.Tensor, to: int) -> None:
        for part in (torch.tensor(numbers.shape), numbers.contiguous()):
            if part.numel():
                self.send([(to, part.to(self.device).view(torch.uint8).flatten())], 0)
                self.finish(lambda: False)  # the buffer is this call's own

    def receive_numbers(self, of: int) -> torch.Tensor:
        shape = self._numbers(2, of)
        rows, columns = shape.tolist()
        return self._numbers(rows * columns, of).view(rows, columns)

    def _numbers(self, count: int, of: int) -> torch.Tensor:
        found = torch.empty(count, dtype=torch.int64, device=self.device)
        if count:
            self.receive([(of, found.view(torch.uint8))], 0)
            self.finish(lambda: False)
        return found.cpu()

    def prepare(self, num_bytes: int, *, to: Sequence[int], of: Sequence[int]) -> None:
        del num_bytes, to, of  # buffers are the update's own

    def outbox(self, num_bytes: int) -> list[torch.Tensor]:
        return [torch.empty(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(IN_FLIGHT)]

    inbox = outbox

    def send(self, parts: Sequence[Part], number: int) -> Callable[[], None]:
        del number  # a round is known by its turn
        return self._group([(self._joined().send, member, buffer) for member, buffer in parts])

    def receive(self, parts: Sequence[Part], number: int) -> list[Arrival]:
        del number
        come = self._group([(self._joined().recv, member, buffer) for member, buffer in parts])

        def arrival(buffer: torch.Tensor) -> Arrival:
            def arrived() -> torch.Tensor:
                come()
                return buffer

            return arrived

        return [arrival(buffer) for _, buffer in parts]

    def _group(self, calls: Sequence[tuple[Callable[..., Any], int, torch.Tensor]]) -> Callable[[], None]:
        """One group of NCCL calls, after what the caller's stream has queued; the result has that stream wait for
        it."""
        stream, communicator = self._stream, self._joined()
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        communicator.group_start()
        try:
            for call, member, buffer in calls:
                call(buffer, member, stream=stream)
        finally:
            communicator.group_end()  # a group left open would hold back all NCCL calls of this thread, torch's too
        if stream is None:
            return lambda: None
        done = stream.record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)

    def taken(self, parts: Sequence[Part], number: int) -> None:
        del parts, number  # the next round's receive waits for the caller's stream

    def finish(self, given_up: Callable[[], bool]) -> None:
        if self._stream is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        done, began = self._stream.record_event(), time.monotonic()
        look = began + LOOK_SECONDS
        while not done.query():
            now = time.monotonic()
            if now > look:
                look = now + LOOK_SECONDS
                if given_up() or now > began + self.meeting.timeout_seconds:
                    self.close()
                    raise RuntimeError("weight sync: another member did not do its part of an NCCL round")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.destroy()

    def _joined(self) -> Any:
        if self._communicator is None:
            raise RuntimeError("weight sync: this member has left its group")
        return self._communicator
