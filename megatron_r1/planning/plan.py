"""A plan: does a configuration fit its GPUs, how long does a step take, and what holds it back.

Puts the parts together: trainer (trainer.py), servers (decoding.py, rollouts.py), and the weights on their way from one
to the other.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.decoding import RooflineCost, ServerMemory, server_memory
from megatron_r1.planning.hardware import GIB, GPU, Assumptions
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.rollouts import Request, simulate
from megatron_r1.planning.sharing import (
    Moment,
    colocated_moments,
    layer_bytes_of_server,
    layers_at_once,
    sync_bytes_of_server,
)
from megatron_r1.planning.sync import SyncTime, sync_time
from megatron_r1.planning.traffic import Served
from megatron_r1.planning.trainer import RankMemory, TrainerSetup, TrainerTime, trainer_memory, trainer_time
from megatron_r1.planning.workload import Workload

OFFLOAD = ("weights", "gradients", "optimizer")
MIN_FRACTION = 0.05
"""A server's share below this is no remedy."""
TAIL_SHARE = 0.25
"""The rollout's tail begins when fewer than this share of its greatest number of sequences run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSetup:
    """`num_servers` of `tensor` GPUs each; `colocated` ones share the trainer's GPUs."""

    num_servers: int
    tensor: int
    max_running: int = 256
    max_model_len: int = 33_792
    memory_fraction: float = 0.85
    weight_bytes: int = 2
    """1: FP8, in blocks of 128 that every GPU must have whole."""
    expert_parallel: bool = False
    cache_bytes: int = 2
    colocated: bool = False
    sleep_level: int = 0
    deepest_sleep: int = 2
    """1 with drafting: its layers are not in a sync, so the server must keep them."""
    moved: bool = False
    """The configuration's share the trainer's GPUs; these have their own."""
    bucket_bytes: int = 512 << 20

    @property
    def gpus(self) -> int:
        return self.num_servers * self.tensor

    @property
    def served(self) -> Served:
        """What decides which bytes they want."""
        return Served(
            count=self.num_servers,
            tensor=self.tensor,
            expert_parallel=self.expert_parallel,
            weight_bytes=self.weight_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTime:
    """Seconds; `floor` is one server's time to read the weights once for each of its longest sequence's tokens."""

    seconds: float
    tail: float
    floor: float
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about one layout. `faults` say what does not fit; empty means that it does."""

    trainer: TrainerSetup | None
    servers: ServerSetup | None
    memory: RankMemory | None
    server: ServerMemory | None
    time: TrainerTime | None
    rollout: RolloutTime | None
    sync: SyncTime | None
    faults: list[str]
    sync_every: int = 1
    """Steps per weight sync."""

    @property
    def gpus(self) -> int:
        trainer = self.trainer.parallel.world_size if self.trainer else 0
        if self.servers is None:
            return trainer
        return max(trainer, self.servers.gpus) if self.servers.colocated else trainer + self.servers.gpus

    @property
    def seconds(self) -> float:
        """One step, phases one after the other; of a sync its share, where it is not of every step."""
        return sum(value / (self.sync_every if name == "sync" else 1) for name, value in self.phases().items())

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of a step that has it."""
        found = {}
        if self.rollout:
            found["rollout"] = self.rollout.seconds
        if self.time:
            found |= {"logprob": self.time.scoring + self.time.swap, "train": self.time.train}
        if self.sync:
            found["sync"] = self.sync.seconds
        return found

    def parts(self) -> dict[str, float]:
        """The step's seconds by what they wait for."""
        found: dict[str, float] = {}
        if self.rollout:
            found["decoding"] = self.rollout.seconds - self.rollout.tail
            found["the longest answers"] = self.rollout.tail
        if self.time:
            own = self.time
            bubble = own.bubble + own.scoring_bubble
            found["pipeline bubbles"] = bubble
            found["all-to-all and other traffic"] = own.traffic
            found["gradient reduction"] = own.reduction
            found["swapping policies"] = own.swap
            found["matmuls"] = own.total - bubble - own.traffic - own.reduction - own.swap
        if self.sync:
            found["weight sync"] = self.sync.seconds / self.sync_every
        return found

    @property
    def binding(self) -> str:
        """The greatest part: what to improve first."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name]) if parts else ""


def planned_shape(needs: Needs, shape: ModelShape) -> ModelShape:
    """What a stage builds of its model: a reward model has one value for a head, and no MTP layers."""
    if needs.trainer is None or not needs.trainer.reward_head:
        return shape
    return dataclasses.replace(shape, reward_head=True, num_mtp_layers=0)


def setups_of(needs: Needs) -> tuple[TrainerSetup | None, ServerSetup | None]:
    """What a stage asks for, as the planner counts it."""
    own, trainer = needs.trainer, None
    if own is not None:
        trainer = TrainerSetup(
            parallel=own.parallel,
            row_tokens=own.train.tokens_per_microbatch,
            recompute=own.train.recompute,
            dtype=own.train.dtype,
            distributed=own.optimizer.distributed,
            moments=own.optimizer.moments,
            train_mtp=own.train_mtp,
            logprob_chunk_tokens=own.train.logprob_chunk_tokens,
            offload=own.train.offload,
        )
    return trainer, _servers(needs.rollout) if needs.rollout is not None else None


def _servers(rollout: RolloutConfig) -> ServerSetup:
    return ServerSetup(
        num_servers=rollout.num_engines,
        tensor=rollout.tensor_parallel,
        max_running=rollout.max_num_seqs,
        max_model_len=rollout.max_model_len,
        memory_fraction=rollout.memory_fraction,
        weight_bytes=1 if rollout.fp8_folder is not None else 4 if rollout.dtype == "fp32" else 2,
        expert_parallel=rollout.expert_parallel,
        cache_bytes=1 if rollout.kv_cache_dtype == "fp8" else 2,
        colocated=rollout.sync == "ipc",
        deepest_sleep=1 if rollout.draft_tokens else 2,
        sleep_level=rollout.sleep_level,
        bucket_bytes=rollout.sync_bucket_mib << 20,
    )


def make_plan(
    shape: ModelShape,
    trainer: TrainerSetup | None,
    servers: ServerSetup | None,
    work: Workload,
    gpu: GPU,
    assume: Assumptions,
    *,
    exact: bool = True,
    timed: bool = True,
) -> Plan:
    """Memory of a layout; if `timed`, the times of the parts that fit."""
    memory = trainer_memory(shape, trainer, work, assume, exact=exact) if trainer else None
    server = None
    if servers:
        server = server_memory(
            shape,
            gpu,
            tensor=servers.tensor,
            memory_fraction=servers.memory_fraction,
            weight_bytes=servers.weight_bytes,
            expert_parallel=servers.expert_parallel,
            cache_bytes=servers.cache_bytes,
        )
    trainer_faults = trainer_memory_faults(gpu, memory, trainer) if memory and trainer else []
    server_faults = []
    if server and servers:
        server_faults = server_memory_faults(shape, gpu, server, servers, trainer)
    if memory and trainer and server and servers and servers.colocated and not trainer_faults + server_faults:
        trainer_faults = shared_memory_faults(shape, gpu, memory, server, trainer, servers)
    time = rollout = sync = None
    if timed and trainer and not trainer_faults:
        time = trainer_time(shape, trainer, work, gpu, assume)
    if timed and servers and server and not server_faults:
        rollout = rollout_time(shape, servers, server, work, gpu, assume)
        if trainer:
            sync = sync_of(shape, trainer, servers, gpu, assume)
    return Plan(
        trainer=trainer,
        servers=servers,
        memory=memory,
        server=server,
        time=time,
        rollout=rollout,
        sync=sync,
        faults=trainer_faults + server_faults,
        sync_every=work.sync_every,
    )


def trainer_memory_faults(gpu: GPU, memory: RankMemory, trainer: TrainerSetup) -> list[str]:
    """Whether the fullest rank fits a GPU of its own."""
    if memory.total / GIB <= gpu.memory_gib:
        return []
    return [
        f"parallel: {trainer.parallel.world_size} trainer ranks need {memory.total / GIB:.1f} GiB on pipeline rank "
        f"{memory.pipeline_rank}; a {gpu.name} has {gpu.memory_gib:.1f} GiB"
    ]


def server_memory_faults(
    shape: ModelShape, gpu: GPU, server: ServerMemory, servers: ServerSetup, trainer: TrainerSetup | None
) -> list[str]:
    """Whether a server holds its weights and its longest sequence, and, if a trainer gives it weights over the network,
    a sync beside them."""
    have = gpu.memory_gib
    if server.cache_tokens < servers.max_model_len:
        holds = "cannot hold the weights" if server.cache < 0 else f"keeps a cache of {server.cache_tokens:,} tokens"
        return [
            f"rollout.tensor_parallel is {servers.tensor}; a server of {servers.tensor} {gpu.name} {holds} "
            f"({server.weights / GIB:.1f} GiB of weights on each, {servers.memory_fraction:.0%} of {have:.1f} GiB to "
            f"use), and needs a cache of rollout.max_model_len = {servers.max_model_len:,}"
        ]
    if servers.colocated or trainer is None:
        return []
    layers = layers_at_once(trainer.parallel, servers.tensor, servers.num_servers)
    at_sync = sync_bytes_of_server(_layer_bytes(shape, servers), servers.bucket_bytes, layers) / GIB
    free = (1 - servers.memory_fraction) * have
    if at_sync <= free:
        return []
    return [
        f"rollout.memory_fraction is {servers.memory_fraction}; a sync needs {at_sync:.1f} GiB beside a server's "
        f"weights and cache, and {free:.1f} of {have:.1f} GiB are left: use at most {1 - at_sync / have:.2f}, or a "
        "smaller rollout.sync_bucket_mib"
    ]


def shared_memory_faults(
    shape: ModelShape,
    gpu: GPU,
    memory: RankMemory,
    server: ServerMemory,
    trainer: TrainerSetup,
    servers: ServerSetup,
) -> list[str]:
    """Whether trainer and servers find room on the same GPUs in each moment of a step."""
    moments = colocated_moments(
        memory.state,
        training_bytes=memory.total,
        reserved_bytes=memory.reserved + memory.fp8_copies,
        server_share=servers.memory_fraction * gpu.memory_gib * GIB,
        server_weights=server.weights,
        layer_bytes=_layer_bytes(shape, servers),
        sleep_level=servers.sleep_level,
        offload=trainer.offload,
    )
    have = gpu.memory_gib
    return [
        f"rollout.sync is ipc; {moment.name} needs {moment.needed / GIB:.1f} GiB of each GPU ({moment.what}), and a "
        f"{gpu.name} has {have:.1f}: {_room_for(moment, trainer, servers, have)}"
        for moment in moments
        if moment.needed / GIB > have
    ]


def _room_for(moment: Moment, trainer: TrainerSetup, servers: ServerSetup, have: float) -> str:
    """What would make room in this moment."""
    missing = [part for part in OFFLOAD if part not in trainer.offload and (part != "weights" or moment.name != "sync")]
    offload = f"train.offload {' '.join((*trainer.offload, *missing))}" if missing else ""
    # The moments in which an awake server has its whole share.
    share = servers.memory_fraction - (moment.needed / GIB - have) / have
    whole = moment.name == "sampling" or not servers.sleep_level
    smaller = f"rollout.memory_fraction {math.floor(share * 100) / 100}" if whole and share > MIN_FRACTION else ""
    sleep = f"rollout.sleep_level {servers.deepest_sleep}"
    if moment.name == "training":
        ways = [sleep] if servers.sleep_level == 0 else []
        ways += [smaller, "a smaller train.tokens_per_microbatch", "more GPUs"]
    else:
        asleep = "" if servers.sleep_level or moment.name == "sampling" else sleep
        ways = [offload, asleep, smaller] if offload or asleep or smaller else ["more GPUs"]
    *first, last = [way for way in ways if way]
    return f"use {', '.join(first)} or {last}" if first else f"use {last}"


def _layer_bytes(shape: ModelShape, servers: ServerSetup) -> float:
    return layer_bytes_of_server(
        shape,
        tensor=servers.tensor,
        expert_parallel=servers.expert_parallel,
        weight_bytes=servers.weight_bytes,
    )


def rollout_time(
    shape: ModelShape, servers: ServerSetup, memory: ServerMemory, work: Workload, gpu: GPU, assume: Assumptions
) -> RolloutTime:
    """One rollout, simulated on one server with its share of the samples."""
    cost = server_cost(shape, servers, gpu, assume)
    lengths = work.lengths()[:: servers.num_servers]
    longest = servers.max_model_len - work.prompt_tokens
    requests = [
        # A group shares its prompt, which is read once (prefix caching).
        Request(index=i, prompt_tokens=work.prompt_tokens, length=min(length, longest))
        for i, length in enumerate(lengths)
    ]
    done = simulate(
        requests, num_servers=1, cost=cost, max_running=servers.max_running, cache_tokens=memory.cache_tokens
    )
    most = max((count for _, count in done.running), default=0)
    tail_from = next((t for t, count in reversed(done.running) if count >= TAIL_SHARE * most), 0.0)
    floor = max(lengths) * cost.met_weights(1) / gpu.memory_bandwidth
    return RolloutTime(seconds=done.seconds, tail=done.seconds - tail_from, floor=floor, preemptions=done.preemptions)


def server_cost(shape: ModelShape, servers: ServerSetup, gpu: GPU, assume: Assumptions) -> RooflineCost:
    return RooflineCost(
        shape,
        gpu,
        assume,
        servers.tensor,
        servers.weight_bytes,
        expert_parallel=servers.expert_parallel,
        cache_bytes=servers.cache_bytes,
    )


def sync_of(shape: ModelShape, trainer: TrainerSetup, servers: ServerSetup, gpu: GPU, assume: Assumptions) -> SyncTime:
    """The weights' way from a trainer to servers."""
    return sync_time(shape, trainer.parallel, servers.served, gpu, assume, colocated=servers.colocated)
