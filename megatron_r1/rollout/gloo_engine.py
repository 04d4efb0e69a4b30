"""vLLM weight transfer over gloo, for servers on CPU: the worker's half, and vLLM's trainer interface to
ours.

vLLM 0.32 ships transfer engines for GPUs only; this one stands behind the same interface and loads layer by
layer (reload.py). It runs inside vLLM (see vllm_plugin.py). A failed update leaves the model able to serve,
with the weights of some layers possibly new: the trainer must push again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_r1.rollout.buckets import plan_buckets, view
from megatron_r1.rollout.gloo_channel import GlooLink, GlooMeeting, meet, transfer
from megatron_r1.rollout.reload import Reload


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
        try:
            for bucket in plan_buckets(list(zip(update_info.names, dtypes, shapes)), self.bucket_bytes):
                # A new buffer each time: a layer's tensors are views of it until the last of them has come.
                buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
                self.link.broadcast(buffer)
                named = zip(bucket.offsets, bucket.specs)
                reload.add((spec[0], view(buffer, offset, spec)) for offset, spec in named)
        except BaseException:
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Nothing is left to do: every layer was finished when it was loaded."""

    def shutdown(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Trainer-side rendezvous: see GlooMeeting."""

    backend: ClassVar[str] = "gloo"

    meeting: GlooMeeting


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """vLLM's trainer interface over gloo_channel, for trainers that go through
    WeightTransferTrainerFactory.
    """

    init_info_cls = GlooTrainerInitInfo
    meeting: GlooMeeting
    link: GlooLink | None = None

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Meet the workers; called on every trainer rank, only rank 0 joins the group."""
        if source is None:
            raise ValueError("the gloo trainer engine needs a WeightSource; got None")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.meeting = init_info.meeting
        if engine.is_sender:
            engine.link = meet(client, engine.meeting)
        return engine

    def send_weights(self) -> None:
        """One whole update. Called on every trainer rank; all iterate the source, rank 0 sends."""
        assert self.source is not None
        specs = [(meta.name, meta.dtype, meta.shape) for meta in self.source.metadata()]
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        assert self.link is not None
        transfer(self.client, self.link, specs, self.source, self.meeting.bucket_bytes)

    def shutdown(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None
