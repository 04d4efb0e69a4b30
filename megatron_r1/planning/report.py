"""How a plan is said: plain text for people, plain values for machines."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from megatron_r1.planning.fit import options
from megatron_r1.planning.hardware import GIB
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.plan import Plan
from megatron_r1.planning.summary import describe_model

if TYPE_CHECKING:
    from megatron_r1.planning.command import Answer


def as_text(answer: Answer) -> str:
    work, gpu = answer.work, answer.gpu
    lines = [
        describe_model(answer.name, answer.shape),
        f"step: {work.samples:,} sequences of {work.prompt_tokens:,} + {work.mean_response:,} tokens (mean, assumed; "
        f"at most {work.max_response:,}), {work.optimizer_steps} optimizer step(s), {work.scoring_passes} scoring "
        "pass(es)",
        f"gpu: {answer.gpus} {gpu.name}, {gpu.memory_gib:.1f} GiB each",
    ]
    if answer.own is not None:
        lines += ["", f"{answer.name} as it is, {answer.own.gpus} GPUs:", *_plan_lines(answer.own, answer)]
        lines += [f"  {answer.own_deadlines}"] if answer.own_deadlines else []
        lines += [f"  does not fit: {fault}" for fault in answer.own_faults]
    if answer.found:
        lines += ["", f"layouts that fit {answer.gpus} {gpu.name}, fastest first (all times are estimates):"]
        lines += [_row(plan) for plan in answer.found]
        lines += ["", "the first in full:", *_plan_lines(answer.found[0], answer), f"  {options(answer.found[0])}"]
    else:
        lines += ["", f"nothing that was searched fits {answer.gpus} {gpu.name}"]
        if answer.least:
            lines += [f"the least that does, {answer.least.gpus} GPUs:", *_plan_lines(answer.least, answer)]
            lines.append(f"  {options(answer.least)}")
    return "\n".join(lines)


def layout(plan: Plan) -> str:
    """TP8 PP16 EP8 x DP2, 256 GPUs + 16 servers of TP32."""
    words = []
    if plan.trainer:
        p = plan.trainer.parallel
        sizes = {
            "TP": p.tensor, "PP": p.pipeline_parallel, "VPP": p.virtual_pipeline, "CP": p.context, "EP": p.expert,
            "ETP": p.expert_tensor,
        }  # fmt: skip
        used = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
        words.append(f"{used or 'one rank'} x DP{p.data}, {p.world_size} GPUs")
    if plan.servers:
        s = plan.servers
        kinds = (" EP" if s.expert_parallel else "") + (" in FP8" if s.weight_bytes == 1 else "")
        words.append(f"{s.num_servers} server(s) of TP{s.tensor}{kinds}")
    return " + ".join(words)


def _row(plan: Plan) -> str:
    phases = ", ".join(f"{name} {seconds:,.3g}" for name, seconds in plan.phases().items())
    if plan.sync:
        phases += f" for {plan.sync.busiest_bytes / 1e9:,.1f} GB on a link"
    memory = f", {plan.memory.total / GIB:.1f} GiB" if plan.memory else ""
    return f"  {plan.seconds:8,.1f} s  {layout(plan)}{memory} ({phases}; most: {plan.binding})"


def _plan_lines(plan: Plan, answer: Answer) -> list[str]:
    lines = [f"  layout: {layout(plan)}"]
    memory, server = plan.memory, plan.server
    if memory:
        state = memory.state
        lines.append(
            f"  trainer, fullest rank (pipeline rank {memory.pipeline_rank}): weights {_gib(state.weights)}, gradients "
            f"{_gib(state.gradients)}, optimizer {_gib(state.optimizer)}, activations {_gib(memory.kept)} kept and "
            f"{_gib(memory.working)} at work, logits {_gib(memory.logits)}, reserved {_gib(memory.reserved)}: "
            f"{_gib(memory.total)} of {answer.gpu.memory_gib:.1f} GiB; host {_gib(memory.host)}"
        )
    if server and plan.servers:
        lines.append(
            f"  server, each GPU: weights {_gib(server.weights)}, cache {_gib(max(0.0, server.cache))} = "
            f"{server.cache_tokens:,} tokens of {server.cache_bytes_per_token:,} bytes"
        )
    for name, seconds in plan.phases().items():
        digits = 2 if name == "sync" else 1
        every = f" once in {plan.sync_every} steps" if name == "sync" and plan.sync_every > 1 else ""
        lines.append(f"  {name}: {seconds:,.{digits}f} s{every}{_remark(plan, name)}")
    if plan.phases():
        lines.append(f"  step: {plan.seconds:,.1f} s, most of it {plan.binding} ({plan.parts()[plan.binding]:,.1f} s)")
    return lines


def _remark(plan: Plan, phase: str) -> str:
    time, rollout, sync = plan.time, plan.rollout, plan.sync
    if phase == "train" and time:
        return (
            f" ({time.microbatches} microbatches an optimizer step; bubble {time.bubble:,.1f}, traffic "
            f"{time.traffic:,.1f}, gradient reduction {time.reduction:,.1f})"
        )
    if phase == "rollout" and rollout:
        return (
            f" (tail {rollout.tail:,.1f}; floor of the longest answer at full memory bandwidth {rollout.floor:,.1f}; "
            f"{rollout.preemptions:,} preemptions per server)"
        )
    if phase == "sync" and sync:
        over = {"network": "the network", "nvlink": "NVLink", "host memory": "the host's memory"}[sync.link]
        return (
            f" ({sync.bytes_sent / 1e9:,.0f} GB over {over}: at most {sync.sender_bytes / 1e9:,.1f} out of a GPU, "
            f"{sync.receiver_bytes / 1e9:,.1f} into one, {sync.node_bytes / 1e9:,.0f} of a node; some link has "
            f"{sync.least_bytes / 1e9:,.1f} in any plan, {sync.floor:.2f} s at its full rate)"
        )
    return ""


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def as_json(answer: Answer) -> dict[str, Any]:
    """Bytes, seconds and counts; names as in the text."""
    count = count_parameters(answer.shape)
    return {
        "name": answer.name,
        "parameters": {"total": count.total, "active": count.active, "routed": count.routed, "mtp": count.mtp},
        "gpu": dataclasses.asdict(answer.gpu),
        "gpus": answer.gpus,
        "workload": dataclasses.asdict(answer.work),
        "fits": not answer.own_faults if answer.own is not None else bool(answer.found),
        "faults": answer.own_faults,
        "own": _plan_json(answer.own) if answer.own else None,
        "found": [_plan_json(plan) for plan in answer.found],
        "least": _plan_json(answer.least) if answer.least else None,
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return dataclasses.asdict(plan) | {
        "gpus": plan.gpus,
        "layout": layout(plan),
        "memory_bytes": plan.memory.total if plan.memory else None,
        "phases": plan.phases(),
        "parts": plan.parts(),
        "seconds": plan.seconds,
        "busiest_bytes": plan.sync.busiest_bytes if plan.sync else None,
        "binding": plan.binding,
        "options": options(plan),
    }
