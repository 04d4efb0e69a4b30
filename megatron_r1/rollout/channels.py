"""An open connection for weights between the trainer and a set of servers, one class per way of opening it.

gloo is ours (vLLM has none for CPU) and needs no vLLM in the trainer; nccl and ipc are vLLM's own trainer
engines, built by its factory and driven through our control plane. A channel belongs to incarnations of
servers: when one restarts, the channel is dropped and a new one opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch

from megatron_r1.config import RolloutConfig
from megatron_r1.errors import EngineError
from megatron_r1.rollout.buckets import ParamSpec
from megatron_r1.rollout.client import RequestError
from megatron_r1.rollout.control import ControlPlane
from megatron_r1.rollout.gloo_channel import LOOPBACK, GlooMeeting, meet, transfer
from megatron_r1.rollout.server import Engine, free_port
from megatron_r1.rollout.source import TrackedSource

ChannelKey = tuple[tuple[int, int], ...]
"""(index, starts) of each server."""

MEETING_SECONDS = 300.0


class Channel(Protocol):
    key: ChannelKey
    control: ControlPlane

    def send(self, specs: Sequence[ParamSpec]) -> None:
        """One whole update from the channel's source."""
        ...

    def close(self) -> None: ...


class GlooChannel:
    """Rank 0's channel over gloo; the other ranks have none."""

    def __init__(self, key: ChannelKey, control: ControlPlane, source: TrackedSource, meeting: GlooMeeting) -> None:
        self.key = key
        self.control = control
        self.source = source
        self.meeting = meeting
        control.weight_versions()  # a dead server is found here; at the meeting one would wait for it
        self.link = meet(control, meeting)

    def send(self, specs: Sequence[ParamSpec]) -> None:
        transfer(self.control, self.link, specs, self.source, self.meeting.bucket_bytes)

    def close(self) -> None:
        self.link.close()
        self.control.close()
        Path(self.meeting.store_path).unlink(missing_ok=True)


class VllmChannel:
    """vLLM's own trainer engine (nccl or ipc), on every trainer rank."""

    def __init__(self, key: ChannelKey, control: ControlPlane, trainer_engine: Any) -> None:
        self.key = key
        self.control = control
        self.trainer_engine = trainer_engine

    def send(self, specs: Sequence[ParamSpec]) -> None:
        self.trainer_engine.send_weights()

    def close(self) -> None:
        self.trainer_engine.shutdown()
        with contextlib.suppress(EngineError, RequestError):  # a dead server has nothing to leave in order
            self.control.shutdown_weight_transfer_engine()
        self.control.close()


class MetadataSource:
    """Our source in the form that vLLM's engines read: metadata() as ParamMeta."""

    def __init__(self, source: TrackedSource) -> None:
        self.source = source

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in self.source.metadata()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.source)


def open_channel(
    config: RolloutConfig,
    *,
    key: ChannelKey,
    engines: Sequence[Engine],
    source: TrackedSource,
    rank: int,
    private_dir: Path | None,
) -> Channel:
    """Connect to `engines` (empty on ranks other than 0). Raises EngineError when they do not come to the
    meeting.
    """
    control = ControlPlane(engines)
    num_workers = len(engines) * config.tensor_parallel
    bucket_bytes = config.sync_bucket_mib * 2**20
    if config.sync == "gloo":
        assert private_dir is not None
        meeting = GlooMeeting(
            store_path=str(private_dir / uuid4().hex),
            world_size=1 + num_workers,
            bucket_bytes=bucket_bytes,
            timeout_seconds=MEETING_SECONDS,
        )
        return GlooChannel(key, control, source, meeting)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    if config.sync == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        host = engines[0].trainer_host if engines else LOOPBACK  # rank 0 listens there
        init_info: Any = NCCLTrainerInitInfo(
            rank=rank,
            master_address=host,
            master_port=free_port(host),
            world_size=1 + num_workers,
            packed_buffer_size_bytes=bucket_bytes,
        )
    else:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        init_info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
    client: Any = control
    wrapped: Any = MetadataSource(source)
    trainer_engine = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=wrapped)
    return VllmChannel(key, control, trainer_engine)
