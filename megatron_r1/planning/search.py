"""Layouts of N GPUs that fit, fastest step first.

GPUs are split between trainer and servers; for every split the trainer's and the servers' best layouts are looked for
apart, because a synchronous step is the sum of their phases. A configuration whose servers share the trainer's GPUs is
given layouts of both kinds: on the same GPUs in turns, on one node, and apart. Sizes are powers of two, as Megatron's
groups and the models' shapes are; context parallelism is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_r1.config.schema import OffloadPart, ParallelConfig
from megatron_r1.config.server_faults import broken_blocks, splits
from megatron_r1.config.shape import ModelShape
from megatron_r1.config.trainer_faults import parallel_faults
from megatron_r1.planning.decoding import FP8_BLOCK, server_memory
from megatron_r1.planning.hardware import GPU, Assumptions
from megatron_r1.planning.plan import Plan, ServerSetup, make_plan, sync_of
from megatron_r1.planning.stages import even_layout
from megatron_r1.planning.trainer import TrainerSetup, trainer_memory, trainer_time
from megatron_r1.planning.workload import Workload

POWERS = tuple(2**i for i in range(12))
EVERYTHING: tuple[OffloadPart, ...] = ("weights", "gradients", "optimizer")
SHARES = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4)
"""Of the GPUs that serve rollouts."""


@dataclass(frozen=True, slots=True)
class _Case:
    """What is the same for every layout that is looked at."""

    shape: ModelShape
    gpu: GPU
    work: Workload
    assume: Assumptions

    def plan(self, trainer: TrainerSetup | None, servers: ServerSetup | None, *, timed: bool = True) -> Plan:
        return make_plan(self.shape, trainer, servers, self.work, self.gpu, self.assume, timed=timed)


def search(
    shape: ModelShape,
    gpus: int,
    gpu: GPU,
    work: Workload,
    assume: Assumptions,
    trainer: TrainerSetup | None,
    servers: ServerSetup | None,
    *,
    keep: int = 5,
) -> list[Plan]:
    """At most `keep` plans that fit at most `gpus` GPUs, by their step's seconds; `trainer` and `servers` give what is
    not searched (row length, precision, sequence limits)."""
    case = _Case(shape, gpu, work, assume)
    if trainer is None:
        return _ranked(case, [], _servers_for(case, gpus, servers), keep)
    if servers is None:
        return _ranked(case, _best_trainers(case, gpus, trainer), [], keep)
    found = _in_turns(case, gpus, trainer, servers) if servers.colocated else []
    for served in sorted({_round(gpus * share, gpu.per_node) for share in SHARES}):
        serving = _servers_for(case, served, servers) if 0 < served < gpus else []
        training = _best_trainers(case, gpus - served, trainer) if serving else []
        if training:
            found += _ranked(case, training, serving, 2)
    return _unique(sorted(found, key=lambda plan: plan.seconds))[:keep]


def _in_turns(case: _Case, gpus: int, trainer: TrainerSetup, servers: ServerSetup) -> list[Plan]:
    """Plans of a trainer and servers on the same `gpus`, with room for each moment of a step: as they sleep and offload
    in the configuration or, where that leaves no room, with all that can."""
    if gpus > case.gpu.per_node:
        return []
    for offload, level in ((trainer.offload, servers.sleep_level), (EVERYTHING, servers.deepest_sleep)):
        turns = dataclasses.replace(trainer, offload=offload)
        training = [setup for setup in _best_trainers(case, gpus, turns, keep=8) if setup.parallel.world_size == gpus]
        asleep = dataclasses.replace(servers, sleep_level=level)
        serving = _servers_for(case, gpus, asleep, in_turns=True) if training else []
        fitting = [
            (own, setup) for own in training for setup in serving if not case.plan(own, setup, timed=False).faults
        ][:4]
        if fitting:
            joined = [_joined(case, case.plan(own, None), case.plan(None, setup)) for own, setup in fitting]
            return sorted(joined, key=lambda plan: plan.seconds)
    return []


def smallest(
    shape: ModelShape,
    gpu: GPU,
    work: Workload,
    assume: Assumptions,
    trainer: TrainerSetup | None,
    servers: ServerSetup | None,
) -> Plan | None:
    """The fastest plan of the least number of GPUs (a power of two, or three quarters of one) that fits; None up to
    4,096."""
    sizes = sorted({size for power in POWERS for size in (power, 3 * power // 4) if 1 <= size <= 4096})
    for size in sizes:
        if size % gpu.per_node and size > gpu.per_node:
            continue
        plans = search(shape, size, gpu, work, assume, trainer, servers, keep=1)
        if plans:
            return plans[0]
    return None


def _best_trainers(case: _Case, gpus: int, base: TrainerSetup, keep: int = 2) -> list[TrainerSetup]:
    """The fastest layouts of at most `gpus` ranks that fit. Fewer are used where `gpus` has no layout."""
    timed = []
    for world in _worlds(gpus):
        for parallel in layouts(case.shape, world, base):
            setup = dataclasses.replace(base, parallel=parallel)
            memory = trainer_memory(case.shape, setup, case.work, case.assume, exact=False)
            if memory.total <= case.gpu.memory_gib * 2**30:
                timed.append((trainer_time(case.shape, setup, case.work, case.gpu, case.assume).total, setup))
        if timed:
            break
    timed.sort(key=lambda pair: pair[0])
    return [setup for _, setup in timed[:keep]]


def layouts(shape: ModelShape, world: int, base: TrainerSetup) -> Iterator[ParallelConfig]:
    """Every layout of `world` ranks that validation accepts."""
    moe = shape.moe
    for pipeline in (size for size in POWERS if size <= min(world, shape.num_layers)):
        for virtual in (1, 2) if pipeline > 1 else (1,):
            try:
                layout = even_layout(shape, pipeline * virtual) if pipeline > 1 else ""
            except ValueError:
                continue
            for tensor in (1, 2, 4, 8):
                experts = [size for size in POWERS if moe is not None and size <= moe.num_experts] or [1]
                for expert in experts:
                    if expert * pipeline > world or (moe is not None and tensor > 1 and expert == 1):
                        continue
                    parallel = ParallelConfig(
                        world_size=world,
                        tensor=tensor,
                        sequence=tensor > 1,
                        pipeline_parallel=pipeline,
                        virtual_pipeline=virtual,
                        expert=expert,
                        pipeline_layout=layout,
                    )
                    if base.row_tokens % parallel.row_multiple == 0 and not parallel_faults(parallel, shape):
                        yield parallel


def _servers_for(case: _Case, gpus: int, base: ServerSetup | None, *, in_turns: bool = False) -> list[ServerSetup]:
    """One setup for every tensor-parallel size that fits and divides `gpus`, as many servers as there is room for; on
    GPUs of their own, or `in_turns` with the trainer."""
    assert base is not None
    found = []
    for tensor in POWERS[:7]:
        experts = base.expert_parallel and tensor > 1
        if gpus % tensor or not splits(case.shape, tensor, expert_parallel=experts):
            continue
        if base.weight_bytes == 1 and broken_blocks(case.shape, tensor, FP8_BLOCK, expert_parallel=experts):
            continue
        setup = dataclasses.replace(
            base,
            tensor=tensor,
            num_servers=gpus // tensor,
            expert_parallel=experts,
            colocated=in_turns,
            sleep_level=base.sleep_level if in_turns else 0,
            moved=base.colocated and not in_turns,
        )
        memory = server_memory(
            case.shape,
            case.gpu,
            tensor=tensor,
            memory_fraction=setup.memory_fraction,
            weight_bytes=setup.weight_bytes,
            expert_parallel=experts,
            cache_bytes=setup.cache_bytes,
        )
        if memory.cache_tokens >= setup.max_model_len and setup.num_servers <= case.work.samples:
            found.append(setup)
    # Smaller servers hold more copies of the weights; two sizes are worth timing.
    return found[:2]


def _ranked(case: _Case, trainers: Sequence[TrainerSetup], servers: Sequence[ServerSetup], keep: int) -> list[Plan]:
    halves = [case.plan(setup, None) for setup in trainers]
    others = [case.plan(None, setup) for setup in servers]
    plans = [plan for plan in (*halves, *others) if not plan.faults]
    if trainers and servers:
        plans = [
            _joined(case, half, other) for half in halves for other in others if not half.faults and not other.faults
        ]
    return sorted(plans, key=lambda plan: plan.seconds)[:keep]


def _joined(case: _Case, trainer: Plan, server: Plan) -> Plan:
    """One plan of a trainer's and a server's, with the weights' way from one to the other."""
    assert trainer.trainer is not None and server.servers is not None
    return dataclasses.replace(
        trainer,
        servers=server.servers,
        server=server.server,
        rollout=server.rollout,
        sync=sync_of(case.shape, trainer.trainer, server.servers, case.gpu, case.assume),
    )


def _worlds(gpus: int) -> list[int]:
    """`gpus`, and the greatest powers of two (and three quarters of one) below."""
    sizes = {gpus} | {size for power in POWERS for size in (power, 3 * power // 4) if 0 < size < gpus}
    return sorted(sizes, reverse=True)[:3]


def _round(count: float, multiple: int) -> int:
    return int(count // multiple) * multiple if count >= multiple else int(count)


def _unique(plans: list[Plan]) -> list[Plan]:
    seen: list[Plan] = []
    for plan in plans:
        if not any(plan.trainer == other.trainer and plan.servers == other.servers for other in seen):
            seen.append(plan)
    return seen
