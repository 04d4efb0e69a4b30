"""Memory of GPUs in the moments when trainer and servers both have a claim: sampling, training, and weight sync.

Colocated (rollout.sync ipc), a GPU has a server's part and a rank's: what sleeps, what is offloaded and what stays is
the configuration's (stages/grpo/colocation.py). Apart, a server needs room at a sync beside all that it has: the new
weights of the decoder layers that it takes at once, its share of them, one of them also as the kernels want it, and the
buffers that they come in (engines/vllm/reload.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.config.schema import OffloadPart, ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.decoding import server_layout
from megatron_r1.planning.hardware import GIB
from megatron_r1.planning.stages import Chunk
from megatron_r1.planning.state import RankState
from megatron_r1.planning.tensors import chunk_numbers

ASLEEP_GIB = 2.0
"""What a sleeping server keeps: its CUDA context, NCCL's buffers, CUDA graphs. An assumption."""
SYNC_BUFFERS = 2
"""What a worker receives into (engines/vllm/nccl_peers.py); its parts are copied from there."""
LAYER_COPIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What one GPU holds at once, in bytes; `what` names it for people."""

    name: str
    needed: float
    what: str


def resident(state: RankState, offload: Sequence[OffloadPart]) -> float:
    """Bytes of a rank's state that stay on the GPU while servers sample."""
    parts = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    return float(sum(size for part, size in parts.items() if part not in offload))


def layer_bytes_of_server(shape: ModelShape, *, tensor: int, expert_parallel: bool, weight_bytes: int) -> float:
    """What is loaded at once on one GPU of a server, at most: a decoder layer, or the embedding."""
    alone = dataclasses.replace(shape, num_mtp_layers=0)
    layout = server_layout(tensor, expert_parallel=expert_parallel)
    layers = {shape.is_moe_layer(layer): layer for layer in range(shape.num_layers)}
    greatest = max(float(sum(chunk_numbers(alone, layout, Chunk(layers=(layer,))))) for layer in layers.values())
    return max(weight_bytes * greatest, embedding_bytes(shape) / tensor)


def embedding_bytes(shape: ModelShape) -> float:
    """The largest single tensor of a model, which is in bf16 also where the rest is in FP8."""
    return 2.0 * shape.vocab_size * shape.hidden_size


def layers_at_once(parallel: ParallelConfig, tensor: int, num_servers: int) -> int:
    """Decoder layers that a server of `tensor` GPUs takes at the same time: of as many pipeline stages as have ranks
    for all its GPUs, or as there are for each server (resharding/rounds.py)."""
    stage_ranks = parallel.world_size // parallel.pipeline_parallel
    return min(-(-tensor // stage_ranks), -(-parallel.pipeline_parallel // num_servers))


def sync_bytes_of_server(layer_bytes: float, bucket_bytes: int, layers: int = 1) -> float:
    """Beside a server's weights and cache, while it is given new weights over the network, `layers` at once."""
    return (LAYER_COPIES - 1 + layers) * layer_bytes + SYNC_BUFFERS * bucket_bytes


def colocated_moments(
    state: RankState,
    *,
    training_bytes: float,
    reserved_bytes: float,
    server_share: float,
    server_weights: float,
    layer_bytes: float,
    sleep_level: int,
    offload: Sequence[OffloadPart],
) -> list[Moment]:
    """A shared GPU's three moments. `training_bytes`: a rank's peak; `server_share`: rollout.memory_fraction of the
    GPU; `reserved_bytes`: of the rank, whatever it does."""
    asleep = ASLEEP_GIB * GIB if sleep_level else server_share
    stays = reserved_bytes + resident(state, offload)
    woken = server_weights + ASLEEP_GIB * GIB if sleep_level else server_share
    at_sync = reserved_bytes + resident(state, [part for part in offload if part != "weights"])
    held = f"{training_bytes / GIB:.1f} GiB of a trainer rank"
    return [
        Moment(name="training", needed=training_bytes + asleep, what=f"{held} and {asleep / GIB:.1f} of a server"),
        Moment(
            name="sampling",
            needed=server_share + stays,
            what=f"{server_share / GIB:.1f} GiB of a server and {stays / GIB:.1f} of a trainer rank",
        ),
        Moment(
            name="sync",
            needed=woken + LAYER_COPIES * layer_bytes + at_sync,
            what=f"{(woken + LAYER_COPIES * layer_bytes) / GIB:.1f} GiB of a server and {at_sync / GIB:.1f} of a rank",
        ),
    ]
