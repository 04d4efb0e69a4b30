"""vLLM weight transfer over gloo, for servers on CPU: the worker's half.

vLLM ships transfer engines for GPUs only; this one stands behind the same interface and loads layer by
layer (reload.py). It runs inside vLLM (see plugin.py). A failed update leaves the model able to serve,
with the weights of some layers possibly new: the trainer must push again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_r1.engines.buckets import plan_buckets, view
from megatron_r1.engines.vllm.gloo_channel import GlooLink, GlooMeeting
from megatron_r1.engines.vllm.reload import Reload


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Worker-side rendezvous: see GlooMeeting."""

    store_path: str
    world_size: int
    bucket_bytes: int
    timeout_seconds: float
    rank_offset: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Every parameter of one update, in the order of the stream."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives packed buckets by broadcast from trainer rank 0 and loads them into the model."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    link: GlooLink | None = None
    bucket_bytes: int = 0
    received: bool = False
    """Whether this update's one call of update_weights has come."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, leaving any earlier one."""
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        meeting = GlooMeeting(
            store_path=init_info.store_path,
            world_size=init_info.world_size,
            bucket_bytes=init_info.bucket_bytes,
            timeout_seconds=init_info.timeout_seconds,
        )
        self.bucket_bytes = init_info.bucket_bytes
        self.link = GlooLink(meeting, init_info.rank_offset + worker)

    def start_weight_update(self) -> None:
        """Nothing else to prepare: a layer is touched when all of its tensors have come."""
        self.received = False

    def update_weights(self, update_info: dict) -> None:
        """As vLLM's, without its accelerator synchronisation: a CPU has no stream to wait for."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load all buckets. On any error leave the group, so that the sender fails too.

        One call carries a whole update: layers are told to be complete by its names.
        """
        if self.link is None:
            raise RuntimeError("gloo weight transfer: update_weights came before init_weight_transfer_engine")
        if self.received:
            raise RuntimeError(
                "gloo weight transfer: a second update_weights in one update; name all parameters in one"
            )
        self.received = True
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        shapes = [tuple(shape) for shape in update_info.shapes]
        reload = Reload(self.model, self.model_config, update_info.names)
        buckets = plan_buckets(list(zip(update_info.names, dtypes, shapes)), self.bucket_bytes)
        buffer = torch.empty(max((bucket.num_bytes for bucket in buckets), default=0), dtype=torch.uint8)
        try:
            for bucket in buckets:
                self.link.broadcast(buffer[: bucket.num_bytes])
                named = zip(bucket.offsets, bucket.specs)
                reload.add((spec[0], view(buffer, offset, spec)) for offset, spec in named)
            reload.finish()
        except BaseException:
            reload.close()
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Nothing is left to do: every layer was finished when it was loaded."""

    def shutdown(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None
