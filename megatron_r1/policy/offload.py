"""Give a policy's device memory to somebody else for a while: to host memory and back, bit for bit.

What moves are storages, not tensors: a storage is copied to the host and shrunk to nothing, and later grown again and
filled. Megatron's buffers, their many views, and the optimizer's shards all stay the objects that they are. Gradients
hold nothing between steps, so they are dropped and come back as zeros. The host copies are page-locked on a machine
with GPUs, made once and kept. Left out: whose turn it is (stages/grpo/colocation.py).
"""

# Megatron's annotations are narrower than what it has.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from megatron_r1.config.schema import OffloadPart
from megatron_r1.errors import DeviceMemoryError
from megatron_r1.policy.policy import Policy


class Offload:
    """The parts of one rank's policy that can move; `parts` are those that do. `away` says which are on the host."""

    def __init__(self, policy: Policy, parts: Collection[OffloadPart]) -> None:
        self.policy = policy
        self.parts: tuple[OffloadPart, ...] = tuple(parts)
        self.away: set[OffloadPart] = set()
        self._shrunk: dict[OffloadPart, list[tuple[torch.UntypedStorage, int]]] = {}
        self._hosts: dict[int, torch.Tensor] = {}

    def to_host(self, parts: Iterable[OffloadPart] = ("gradients", "optimizer", "weights")) -> int:
        """Move those of `parts` that move and are here. Returns bytes of device memory given back. No collective."""
        moving: list[OffloadPart] = [part for part in self.parts if part in set(parts) - self.away]
        given = sum(self._give(part) for part in moving)
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()  # activations of the last step too
        return given

    def to_device(self, parts: Iterable[OffloadPart] = ("weights", "optimizer", "gradients")) -> int:
        """Bring those of `parts` back that are away. Returns bytes of device memory taken. No collective."""
        return sum(self._take(part) for part in parts if part in self.away)

    def _give(self, part: OffloadPart) -> int:
        if part == "gradients":
            self.policy.optimizer.zero_grad()  # the optimizer's own copies in fp32
        self._shrunk[part] = [(storage, storage.nbytes()) for storage in self._storages(part)]
        for storage, size in self._shrunk[part]:
            if part != "gradients":
                self._host(storage, size).copy_(_bytes_of(storage), non_blocking=True)
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        for storage, _ in self._shrunk[part]:
            storage.resize_(0)
        self.away.add(part)
        return sum(size for _, size in self._shrunk[part])

    def _take(self, part: OffloadPart) -> int:
        taken = self._shrunk[part]
        for storage, size in taken:
            self._grow(storage, size, part)
            if part == "gradients":
                _bytes_of(storage).zero_()
            else:
                _bytes_of(storage).copy_(self._host(storage, size), non_blocking=True)
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        self.away.remove(part)
        del self._shrunk[part]
        return sum(size for _, size in taken)

    def _grow(self, storage: torch.UntypedStorage, size: int, part: OffloadPart) -> None:
        """Raises DeviceMemoryError if the device has no room; the part is away then, and can be asked for again."""
        try:
            storage.resize_(size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            reason = str(error).split("\n", 1)[0]
            raise DeviceMemoryError(
                f"train.offload: the {part} of rank {dist.get_rank()} do not fit on {self.policy.device} any more "
                f"({size:,} bytes: {reason}); the servers beside it hold more than was planned: lower "
                "rollout.memory_fraction, or use rollout.sleep_level 2"
            ) from error

    def _host(self, storage: torch.UntypedStorage, size: int) -> torch.Tensor:
        """The host copy of a storage, u8[size]."""
        held = self._hosts.get(storage._cdata)
        if held is None or held.numel() != size:
            pinned = self.policy.device.type == "cuda"
            held = self._hosts[storage._cdata] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return held

    def _storages(self, part: OffloadPart) -> list[torch.UntypedStorage]:
        """Those of one part that are on the device, each once."""
        tensors = {"weights": self._weights, "gradients": self._gradients, "optimizer": self._optimizer}[part]()
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        if part == "optimizer":  # in fp32 the master weights may be the weights themselves
            for tensor in self._weights():
                found.pop(tensor.untyped_storage()._cdata, None)
        return [storage for storage in found.values() if storage.nbytes() and storage.device == self._device()]

    def _device(self) -> torch.device:
        return next(self.policy.chunks[0].parameters()).device

    def _weights(self) -> Iterator[torch.Tensor]:
        for chunk in self.policy.chunks:
            yield from itertools.chain(chunk.module.parameters(), chunk.module.buffers())

    def _gradients(self) -> Iterator[torch.Tensor]:
        for chunk in self.policy.chunks:
            yield from (buffer.grad_data for buffer in chunk.buffers + chunk.expert_parallel_buffers)

    def _optimizer(self) -> Iterator[torch.Tensor]:
        """Master weights and moments; not the step counters, which are scalars on the host."""
        whole = self.policy.optimizer
        for one in whole.chained_optimizers if isinstance(whole, ChainedOptimizer) else [whole]:
            if one.optimizer is None:  # this rank owns nothing of its parameters
                continue
            for group in one.optimizer.param_groups:
                yield from group["params"]
            for state in one.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as u8[bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
