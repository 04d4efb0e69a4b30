"""vLLM weight transfer through the host's shared memory: the worker's half (the trainer's is host_memory.py).

For servers on the trainer's machine, on CPUs or on the GPUs that the trainer uses, with any number of ranks and any
tensor parallelism: each worker copies from the shared tensors what belongs to it, as it does from a file when it
starts. vLLM's own ipc engine hands over CUDA memory instead, for which every rank must gather the whole model. Runs
inside vLLM (see plugin.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_r1.engines.buckets import view
from megatron_r1.engines.vllm.host_memory import map_memory, slot, unpin
from megatron_r1.engines.vllm.reload import Reload
from megatron_r1.resharding.layers import group_of_tensor


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Which file to map: see HostMemory."""

    path: str
    slot_bytes: int


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One bucket of an update. The first names all parameters of the update; `abort` says why there is no more."""

    slot: int = 0
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    all_names: list[str] = field(default_factory=list)
    abort: str = ""


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Reads packed buckets from the trainer's HostMemory and loads them into the model."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    buffer: torch.Tensor | None = None
    slot_bytes: int = 0
    reload: Reload | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Map the trainer's memory, leaving any earlier one. RuntimeError where the trainer is on another machine."""
        self.shutdown()
        path = Path(init_info.path)
        if not path.is_file():
            raise RuntimeError(f"ipc weight transfer: {path} is not here; trainer and servers must share one machine")
        self.buffer, self.slot_bytes = map_memory(path, init_info.slot_bytes), init_info.slot_bytes

    def start_weight_update(self) -> None:
        """A broken-off update's layers go back to what they were."""
        self.abandon()

    def update_weights(self, update_info: dict) -> None:
        """As vLLM's; a CPU has no stream to wait for. The trainer fills the slot again when this has returned."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load one bucket. On any error the layers that are not complete keep the weights that they had."""
        try:
            if update_info.abort:
                raise RuntimeError(f"ipc weight transfer: the trainer gave the update up ({update_info.abort})")
            if self.buffer is None:
                raise RuntimeError("ipc weight transfer: update_weights came before init_weight_transfer_engine")
            if update_info.all_names:
                self.reload = Reload(
                    self.model, self.model_config, Counter(map(group_of_tensor, update_info.all_names))
                )
            if self.reload is None:
                raise RuntimeError("ipc weight transfer: the first update_weights must name all parameters")
            self.reload.add(self.tensors(update_info, self.buffer))
        except BaseException:
            self.abandon()
            raise

    def tensors(self, info: SharedMemoryUpdateInfo, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The bucket's tensors, as views of the shared memory."""
        bytes_here = slot(buffer, info.slot, self.slot_bytes)
        specs = [
            (name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes)
        ]
        return [(spec[0], view(bytes_here, offset, spec)) for offset, spec in zip(info.offsets, specs)]

    def finish_weight_update(self) -> None:
        """Every layer was finished when it was complete; see that all were."""
        reload, self.reload = self.reload, None
        if reload is not None:
            reload.finish()

    def abandon(self) -> None:
        if self.reload is not None:
            self.reload.close()
            self.reload = None

    def shutdown(self) -> None:
        self.abandon()
        if self.buffer is not None:
            unpin(self.buffer)
            self.buffer = None
