"""A stretch of a host's memory that the trainer's rank 0 writes weights into and vLLM's workers read them from.

A file in /dev/shm that every process maps; it has no name any more once all have it open, so nothing is left behind by
a crash. Two slots: one is filled while the other is read. vLLM is not imported: the workers' half is ipc_engine.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_r1.engines.buckets import Bucket, ParamSpec, fill, plan_buckets
from megatron_r1.errors import EngineError

NUM_SLOTS = 2
SHARED_MEMORY = Path("/dev/shm")


class HostMemory:
    """`NUM_SLOTS` slots of `slot_bytes`, u8. `path` names the file until `unlink`."""

    def __init__(self, slot_bytes: int, *, folder: Path = SHARED_MEMORY) -> None:
        """EngineError if the folder has no room."""
        self.slot_bytes = slot_bytes
        size = max(1, NUM_SLOTS * slot_bytes)
        handle, name = tempfile.mkstemp(prefix="mr1-weights-", dir=folder)  # mode 0600
        self.path = Path(name)
        try:
            # Without this a full file system would kill a process by SIGBUS in the middle of a copy.
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            self.unlink()
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            raise EngineError(
                f"rollout.sync ipc needs {size / 2**20:,.0f} MiB in {folder}, which has {free / 2**20:,.0f}: give the "
                "container more shared memory (docker --shm-size), or lower rollout.sync_bucket_mib"
            ) from error
        finally:
            os.close(handle)
        try:
            self.buffer = map_memory(self.path, slot_bytes)
        except BaseException:
            self.unlink()
            raise

    def slot(self, number: int) -> torch.Tensor:
        """Slot `number` modulo NUM_SLOTS, u8[slot_bytes]."""
        return slot(self.buffer, number, self.slot_bytes)

    def unlink(self) -> None:
        """Take the file's name away; whoever has mapped it keeps it."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.unlink()
        unpin(self.buffer)


def map_memory(path: Path, slot_bytes: int) -> torch.Tensor:
    """The file's bytes, u8[NUM_SLOTS * slot_bytes], shared with every process that maps it. On a machine with GPUs it
    is page-locked, which makes copies to and from them faster; where that is refused, it works without."""
    buffer = torch.from_file(str(path), shared=True, size=max(1, NUM_SLOTS * slot_bytes), dtype=torch.uint8)
    if torch.cuda.is_initialized() and int(cuda_runtime().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)):
        _forget_error()
        _PAGED.add(buffer.data_ptr())
    return buffer


def unpin(buffer: torch.Tensor) -> None:
    """Undo map_memory's page-locking, before the memory goes."""
    if buffer.data_ptr() in _PAGED:
        _PAGED.remove(buffer.data_ptr())
    elif torch.cuda.is_initialized() and int(cuda_runtime().cudaHostUnregister(buffer.data_ptr())):
        _forget_error()


_PAGED: set[int] = set()
"""Addresses of mapped memory that CUDA did not take."""


def _forget_error() -> None:
    """CUDA keeps the last error, and torch would raise it at its next kernel: let this one raise."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def cuda_runtime() -> Any:
    return torch.cuda.cudart()


def slot(buffer: torch.Tensor, number: int, slot_bytes: int) -> torch.Tensor:
    begin = number % NUM_SLOTS * slot_bytes
    return buffer[begin : begin + slot_bytes]


def slot_bytes_for(specs: Sequence[ParamSpec], bucket_bytes: int) -> int:
    """The largest bucket of an update; a tensor above `bucket_bytes` is one of its own."""
    return max((bucket.num_bytes for bucket in plan_buckets(specs, bucket_bytes)), default=0)


class UpdateClient(Protocol):
    """The part of vLLM's VLLMWeightSyncClient that an update calls."""

    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self) -> None: ...


def transfer(
    client: UpdateClient,
    memory: HostMemory,
    specs: Sequence[ParamSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    bucket_bytes: int,
) -> None:
    """One whole update: a request for each bucket, during which the next bucket is filled.

    Raises ValueError when the iteration disagrees with `specs`, the workers' error when they failed. The workers are
    told of a failure here, so that they end their part of the update.
    """
    client.start_weight_update()
    try:
        with ThreadPoolExecutor(1) as pool:
            for request in _requests(pool, client, memory, specs, iter(tensors), bucket_bytes):
                request.result()
    except BaseException as error:
        with contextlib.suppress(Exception):  # their answer to this is an error
            client.update_weights({"abort": f"{type(error).__name__}: {error}"})
        raise
    client.finish_weight_update()


def _requests(
    pool: ThreadPoolExecutor,
    client: UpdateClient,
    memory: HostMemory,
    specs: Sequence[ParamSpec],
    stream: Iterator[tuple[str, torch.Tensor]],
    bucket_bytes: int,
) -> Iterator[Future[None]]:
    """Each request once the next bucket is filled; a slot is filled again when its reader's request is over."""
    pending: Future[None] | None = None
    names = [name for name, _, _ in specs]
    for number, bucket in enumerate(plan_buckets(specs, bucket_bytes)):
        fill(memory.slot(number), bucket, stream)
        if pending is not None:
            yield pending
        info = update_info(bucket, number) | ({"all_names": names} if number == 0 else {})
        pending = pool.submit(client.update_weights, info)
    if (extra := next(stream, None)) is not None:
        raise ValueError(f"the weight source yielded {extra[0]!r} after the {len(specs)} parameters of its metadata()")
    if pending is not None:
        yield pending


def update_info(bucket: Bucket, number: int) -> dict[str, Any]:
    """The update_info of vLLM's /update_weights for one bucket in its slot."""
    return {
        "slot": number % NUM_SLOTS,
        "names": [name for name, _, _ in bucket.specs],
        "dtype_names": [str(dtype).removeprefix("torch.") for _, dtype, _ in bucket.specs],
        "shapes": [list(shape) for _, _, shape in bucket.specs],
        "offsets": list(bucket.offsets),
    }
