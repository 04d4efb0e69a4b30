"""The gloo group between trainer rank 0 and the vLLM workers, and the sender's half of a transfer.

No default process group is touched, so the trainer's own torch.distributed is free. Members meet through a
file in a 0700 folder (no TCP store) and gloo listens on loopback only; trainer rank 0 and the servers share a
host. vLLM is not imported: the receiver's half is gloo_engine.py.
"""

# torch's stubs lack the gloo backend's methods.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from megatron_r1.engines.buckets import ParamSpec, fill, plan_buckets
from megatron_r1.engines.vllm.host_memory import UpdateClient
from megatron_r1.errors import EngineError

LOOPBACK = "127.0.0.1"
SETTLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooMeeting:
    """What every member of a transfer group must agree on. Worker i of all servers has rank 1 + i."""

    store_path: str
    world_size: int
    bucket_bytes: int
    timeout_seconds: float

    def worker_info(self) -> dict[str, object]:
        """The init_info of vLLM's /init_weight_transfer_engine; the control plane adds each server's rank
        offset.
        """
        return {**asdict(self), "rank_offset": 1}


class GlooLink:
    """Membership of one process in a transfer group (rank 0 sends).

    `close` really ends the connections, which releases peers that wait in a broadcast: nobody but this object
    may hold the process group, because a reference kept by a traceback would keep them open.
    """

    def __init__(self, meeting: GlooMeeting, rank: int) -> None:
        """Enter the group; blocks until all members have."""
        store = torch.distributed.FileStore(meeting.store_path, meeting.world_size)
        timeout = timedelta(seconds=meeting.timeout_seconds)
        store.set_timeout(timeout)
        options = torch.distributed.ProcessGroupGloo._Options()
        options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = timeout
        options._threads = 1
        self._group: torch.distributed.ProcessGroupGloo | None = torch.distributed.ProcessGroupGloo(
            store, rank, meeting.world_size, options
        )

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Send (rank 0) or receive (the others) `buffer`, u8[bytes], in place. RuntimeError if a peer has
        left.
        """
        if self._group is None:
            raise RuntimeError("gloo weight transfer: this member has left its group")
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._group.broadcast([buffer], options).wait()

    def close(self) -> None:
        self._group = None


def update_info(specs: Sequence[ParamSpec]) -> dict[str, list]:
    """The update_info of vLLM's /update_weights, as its own engines write it."""
    return {
        "names": [name for name, _, _ in specs],
        "dtype_names": [str(dtype).removeprefix("torch.") for _, dtype, _ in specs],
        "shapes": [list(shape) for _, _, shape in specs],
    }


class TransferClient(UpdateClient, Protocol):
    """The part of vLLM's VLLMWeightSyncClient that a gloo transfer calls."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...


def meet(client: TransferClient, meeting: GlooMeeting) -> GlooLink:
    """Enter the group as the sender while the workers, told by `client`, enter it too."""
    pool = ThreadPoolExecutor(1)
    try:
        workers = pool.submit(client.init_weight_transfer_engine, meeting.worker_info())
        try:
            link = GlooLink(meeting, 0)
        except RuntimeError as error:
            if (cause := settled_error(workers)) is not None:
                raise cause from None
            raise EngineError(f"weight transfer: the vLLM workers did not come to the meeting ({error})") from error
        workers.result()
        return link
    finally:
        pool.shutdown(wait=False)


def transfer(
    client: TransferClient,
    link: GlooLink,
    specs: Sequence[ParamSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    bucket_bytes: int,
) -> None:
    """One whole update: the workers receive (a blocking request) while this thread broadcasts.

    Raises ValueError when the iteration disagrees with `specs`, the workers' error when they failed. After an
    error the link is closed, so that workers still waiting in the group are released.
    """
    client.start_weight_update()
    pool = ThreadPoolExecutor(1)
    try:
        received = pool.submit(client.update_weights, update_info(specs))
        try:
            send(link, specs, tensors, bucket_bytes, received)
        except RuntimeError as error:  # broken off; the workers' own account of it, if they give one, says more
            if isinstance(error, EngineError):
                raise
            if (cause := settled_error(received)) is not None:
                raise cause from None
            raise EngineError(f"weight transfer: a vLLM worker left in the middle of it ({error})") from error
        received.result()
    except BaseException:
        link.close()
        raise
    finally:
        pool.shutdown(wait=False)
    client.finish_weight_update()


def settled_error(received: Future[None]) -> BaseException | None:
    """The receivers' error if they report one within a few seconds of the sender's."""
    try:
        return received.exception(timeout=SETTLE_SECONDS)
    except TimeoutError:
        return None


def send(
    link: GlooLink,
    specs: Sequence[ParamSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    bucket_bytes: int,
    received: Future[None],
) -> None:
    """Broadcast every tensor of the iteration; `received` is the receivers' pending answer.

    Raises ValueError when the iteration disagrees with `specs`, the receivers' error when they have failed.
    """
    stream = iter(tensors)
    buckets = plan_buckets(specs, bucket_bytes)
    buffer = torch.empty(max((bucket.num_bytes for bucket in buckets), default=0), dtype=torch.uint8)
    for bucket in buckets:
        fill(buffer, bucket, stream)
        if received.done():
            received.result()
        link.broadcast(buffer[: bucket.num_bytes])
    if (extra := next(stream, None)) is not None:
        raise ValueError(f"the weight source yielded {extra[0]!r} after the {len(specs)} parameters of its metadata()")
