"""An open connection for weights that rank 0 gathers: from it to a set of servers, one class per way of opening it.

ipc is ours and needs no vLLM in the trainer; nccl is vLLM's own trainer engine, built by its factory and driven through
our control plane. A channel belongs to incarnations of servers: when one restarts, the channel is dropped and a new one
opened. Over gloo nothing is gathered: shard_channel.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.base import RequestError
from megatron_r1.engines.buckets import ParamSpec
from megatron_r1.engines.source import TrackedSource
from megatron_r1.engines.vllm import host_memory
from megatron_r1.engines.vllm.control import ControlPlane
from megatron_r1.engines.vllm.engine import Engine
from megatron_r1.engines.vllm.host_memory import HostMemory, slot_bytes_for
from megatron_r1.engines.vllm.peers import LOOPBACK
from megatron_r1.engines.vllm.server import free_port
from megatron_r1.engines.vllm.trainer_source import vllm_source
from megatron_r1.errors import EngineError

ChannelKey = tuple[tuple[int, int], ...]
"""(index, starts) of each server."""


class Channel(Protocol):
    key: ChannelKey
    control: ControlPlane

    def send(self, specs: Sequence[ParamSpec]) -> None:
        """One whole update from the channel's source."""
        ...

    def close(self) -> None: ...


class IPCChannel:
    """Rank 0's channel through the host's memory; the other ranks have none."""

    def __init__(self, key: ChannelKey, control: ControlPlane, source: TrackedSource, bucket_bytes: int) -> None:
        self.key = key
        self.control = control
        self.source = source
        self.bucket_bytes = bucket_bytes
        self.memory = HostMemory(slot_bytes_for(list(source.metadata()), bucket_bytes))
        try:
            control.init_weight_transfer_engine({"path": str(self.memory.path), "slot_bytes": self.memory.slot_bytes})
        except BaseException:
            self.memory.close()
            raise
        self.memory.unlink()  # all have it open

    def send(self, specs: Sequence[ParamSpec]) -> None:
        host_memory.transfer(self.control, self.memory, specs, self.source, self.bucket_bytes)

    def close(self) -> None:
        self.memory.close()
        with contextlib.suppress(EngineError, RequestError):  # a dead server has nothing to leave in order
            self.control.shutdown_weight_transfer_engine()
        self.control.close()


class VllmChannel:
    """vLLM's own trainer engine (nccl), on every trainer rank."""

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


def open_channel(
    config: RolloutConfig,
    *,
    key: ChannelKey,
    engines: Sequence[Engine],
    source: TrackedSource,
    rank: int,
) -> Channel:
    """Connect to `engines` (empty on ranks other than 0). Raises EngineError when they do not come to the
    meeting.
    """
    control = ControlPlane(engines)
    num_workers = len(engines) * config.tensor_parallel
    bucket_bytes = config.sync_bucket_mib * 2**20
    if config.sync == "ipc":
        return IPCChannel(key, control, source, bucket_bytes)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    host = engines[0].spec.host if engines else LOOPBACK  # rank 0 listens there
    init_info = NCCLTrainerInitInfo(
        rank=rank,
        master_address=host,
        master_port=free_port(host),
        world_size=1 + num_workers,
        packed_buffer_size_bytes=bucket_bytes,
    )
    client: Any = control
    trainer_engine = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=vllm_source(source))
    return VllmChannel(key, control, trainer_engine)
