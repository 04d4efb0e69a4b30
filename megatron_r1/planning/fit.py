"""Whether a stage's configuration fits its GPUs, asked before it starts; and what would fit if it does not."""

from __future__ import annotations

import dataclasses

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import ConfigError
from megatron_r1.gpus import find_gpus
from megatron_r1.planning.deadlines import deadline_faults
from megatron_r1.planning.hardware import GPU, GPUS, Assumptions, find_gpu
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.plan import Plan, make_plan, planned_shape, setups_of
from megatron_r1.planning.search import search, smallest
from megatron_r1.planning.workload import Workload


def check_fit(needs: Needs, shape: ModelShape) -> str:
    """One line on the fit of a stage that runs on GPUs; "" for one that does not. Raises ConfigError, with what would
    fit, if the trainer's ranks or the servers need more memory than their GPUs have, or a planned phase more time than
    its deadline.

    The GPU is `train.gpu`, or this machine's; where there is neither the line says that nothing was checked."""
    work = needs.work
    if not needs.cuda or work is None:
        return ""
    name = needs.trainer.train.gpu if needs.trainer is not None else ""
    gpu = find_gpu(name, "train.gpu") if name else installed_gpu()
    if gpu is None:
        named = "; name the one that it will run on: --train.gpu h100" if needs.trainer is not None else ""
        return f"memory: not checked (no GPU here{named})"
    shape, assume = planned_shape(needs, shape), Assumptions()
    trainer, servers = setups_of(needs)
    plan = make_plan(shape, trainer, servers, work, gpu, assume, timed=needs.deadlines is not None)
    if plan.faults:
        raise ConfigError([*plan.faults[:-1], f"{plan.faults[-1]}; {remedy(shape, plan, work, gpu, assume)}"])
    late = deadline_faults(needs, shape, plan)
    if late:
        raise ConfigError(late)
    parts = []
    if plan.memory:
        parts.append(f"trainer at most {plan.memory.total / 2**30:.1f} GiB")
    if plan.server:
        parts.append(f"servers keep {plan.server.cache_tokens:,} tokens of cache")
    return f"memory: {', '.join(parts)}; a {gpu.name} has {gpu.memory_gib:.1f} GiB"


def remedy(shape: ModelShape, plan: Plan, work: Workload, gpu: GPU, assume: Assumptions) -> str:
    """What would fit, in words: on as many GPUs, or on the least number that can hold it."""
    plans = search(shape, plan.gpus, gpu, work, assume, plan.trainer, plan.servers, keep=1)
    found = plans[0] if plans else smallest(shape, gpu, work, assume, plan.trainer, plan.servers)
    if found is None:
        return f"nothing that was searched fits on up to 4,096 {gpu.name}: shorten the rows or take larger GPUs"
    return f"what would fit on {found.gpus} {gpu.name}: {options(found)}"


def options(plan: Plan) -> str:
    """The command line's options that make a recipe this plan."""
    words: list[str] = []
    if plan.trainer:
        p = plan.trainer.parallel
        words += [
            f"--parallel.{name.replace('_', '-')} {getattr(p, name)}"
            for name in ("world_size", "tensor", "pipeline_parallel", "virtual_pipeline", "expert", "expert_tensor")
        ]
        words += ["--parallel.sequence" if p.sequence else "--parallel.no-sequence"]
        words += [f"--parallel.pipeline-layout '{p.pipeline_layout}'"]
    if plan.servers:
        words += [
            f"--rollout.num-engines {plan.servers.num_servers}",
            f"--rollout.tensor-parallel {plan.servers.tensor}",
            "--rollout.expert-parallel" if plan.servers.expert_parallel else "--rollout.no-expert-parallel",
        ]
        words += ["--rollout.sync nccl --rollout.sleep-level 0 --train.offload"] if plan.servers.moved else []
        if plan.servers.colocated and plan.trainer:
            words += [
                f"--rollout.sleep-level {plan.servers.sleep_level} --train.offload {' '.join(plan.trainer.offload)}"
            ]
    return " ".join(words)


def installed_gpu() -> GPU | None:
    """The first GPU of this machine, as the driver's nvidia-smi has it (no torch here); None without one. Of a GPU
    that is not in the table only the memory is its own."""
    gpus = find_gpus()
    if not gpus:
        return None
    name = gpus[0].name
    known = next((gpu for key, gpu in GPUS.items() if key in name.lower().split()), GPUS["h100"])
    return dataclasses.replace(known, name=name, memory_gib=gpus[0].memory_bytes / 2**30)
