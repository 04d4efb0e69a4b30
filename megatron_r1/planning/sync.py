"""How long a weight sync takes: the bytes on its busiest link over that link's rate.

Every trainer rank sends each worker its part (docs/weight_sync.md). A GPU has a link to other nodes and one to the GPUs
of its node, each of so many bytes a second one way; sending and receiving are at work at the same time. A node that
has GPUs of both sides and is not alone is counted as two. Servers that share the trainer's GPUs take the weights from
the host's memory: a rank writes there what it sends, a worker reads what it wants, one after the other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.hardware import GPU, Assumptions
from megatron_r1.planning.traffic import Served, traffic
from megatron_r1.resharding.parts import Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncTime:
    """Bytes: `bytes_sent` to all servers together; out of the GPU that sends most and into the one that receives most;
    and of the node that sends or receives most, over the links of all its GPUs. `link`: what they go over.
    `least_bytes`: the busiest link has as many, however senders are chosen. `seconds`; `floor`: those of `least_bytes`
    at the link's full rate."""

    bytes_sent: int
    sender_bytes: int
    receiver_bytes: int
    node_bytes: int
    least_bytes: int
    link: Literal["network", "nvlink", "host memory"]
    seconds: float
    floor: float

    @property
    def busiest_bytes(self) -> int:
        """On the busiest link. In and out of the host's memory are one after the other."""
        if self.link == "host memory":
            return self.sender_bytes + self.receiver_bytes
        return max(self.sender_bytes, self.receiver_bytes)


def sync_time(
    shape: ModelShape,
    parallel: ParallelConfig,
    served: Served,
    gpu: GPU,
    assume: Assumptions,
    *,
    colocated: bool = False,
) -> SyncTime:
    """Of weights from a trainer's ranks to servers, on GPUs of their own or (`colocated`) on the trainer's."""
    found = traffic(shape, parallel, served)
    received = np.tile(found.received, served.count)
    least = [round(found.least_sent), int(found.received.max())]
    if colocated:
        link, rate, share = "host memory", assume.host_link, 1.0
    elif parallel.world_size + len(received) <= gpu.per_node:
        link, rate, share = "nvlink", gpu.nvlink, assume.network_efficiency * assume.sync_overlap
    else:
        link, rate, share = "network", gpu.network, assume.network_efficiency * assume.sync_overlap
    own = SyncTime(
        bytes_sent=int(found.sent.sum()),
        sender_bytes=int(found.sent.max()),
        receiver_bytes=int(received.max()),
        node_bytes=max(busiest_node(found.sent, gpu.per_node), busiest_node(received, gpu.per_node)),
        least_bytes=sum(least) if colocated else max(least),
        link=link,
        seconds=0.0,
        floor=0.0,
    )
    return dataclasses.replace(own, seconds=own.busiest_bytes / (rate * share), floor=own.least_bytes / rate)


def busiest_node(by_gpu: Numbers, per_node: int) -> int:
    """The most bytes of `per_node` GPUs that follow one another."""
    return int(np.add.reduceat(by_gpu, np.arange(0, len(by_gpu), per_node)).max())
