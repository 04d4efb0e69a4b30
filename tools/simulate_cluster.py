"""Walk GRPO steps of a recipe over its layout, event by event, and say where the time goes.

usage: simulate_cluster.py [RECIPE] [--gpu h100] [--model FOLDER] [--steps 6] [--svg FILE] [--FIELD VALUE ...]
       simulate_cluster.py record OUT RUN ...     what runs measured, as a timeline to check against
       simulate_cluster.py check TIMELINE         calibrate on some steps of a timeline, predict the others

Rollout lengths are drawn from a heavy-tailed distribution (lognormal, cut off at the longest answer), servers batch
continuously, the trainer runs 1F1B. Compared are the synchronous loop and what would change it: rollouts one step
ahead (async), unfinished answers carried on in the next step (partial), and more prompts than needed (oversampled).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config import load_shape
from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import UserError
from megatron_r1.planning.compute import rank_passes
from megatron_r1.planning.decoding import LinearCost, StepCost
from megatron_r1.planning.hardware import GPU, Assumptions, find_gpu
from megatron_r1.planning.plan import Plan, ServerSetup, make_plan, server_cost, setups_of
from megatron_r1.planning.rollouts import Request, Timeline, simulate
from megatron_r1.planning.schedule import Slot, one_forward_one_backward
from megatron_r1.planning.stages import pipeline_chunks
from megatron_r1.planning.timeline_picture import Walked, draw
from megatron_r1.planning.workload import Workload
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.stage import needs as needs_of

OVERSAMPLED = 1.25
"""Prompts that are started for each that is needed."""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["record"]:
        return record(Path(arguments[1]), [Path(name) for name in arguments[2:]])
    if arguments[:1] == ["check"]:
        return check(Path(arguments[1]))
    from megatron_r1.__main__ import parse
    from megatron_r1.recipes import PACKAGED_SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--svg", type=Path)
    named = bool(arguments) and not arguments[0].startswith("-")
    options, rest = parser.parse_known_args(arguments[1:] if named else arguments)
    recipe = arguments[0] if named else "grpo_671b"
    config = parse([recipe, *rest])
    if not isinstance(config, GRPOConfig):
        raise UserError(f"{recipe} has no rollouts; simulate a GRPO recipe such as grpo_671b")
    folder = config.model.path
    shape = load_shape(options.model or (folder if folder.exists() else PACKAGED_SHAPES.get(folder.name, folder)))
    gpu = find_gpu(options.gpu)
    walked, slots, plan = walk(config, shape, gpu, steps=options.steps)
    print(text(walked, slots, plan))
    if options.svg:
        options.svg.write_text(draw(walked, slots, title=f"{config.name}, {plan.gpus} {gpu.name}"), encoding="utf-8")
        print(f"picture: {options.svg}")
    return 0


def walk(
    config: GRPOConfig, shape: ModelShape, gpu: GPU, *, steps: int, seed: int = 0
) -> tuple[list[Walked], list[Slot], Plan]:
    """`steps` steps in each way of running the loop, one optimizer step's 1F1B slots, and the plan behind them."""
    needs = needs_of(config)
    trainer, servers = setups_of(needs)
    work, assume = needs.work, Assumptions()
    assert work is not None  # GRPO has
    if config.parallel.virtual_pipeline > 1:
        raise UserError("parallel.virtual_pipeline is above 1; the walk knows plain 1F1B only, the planner both")
    plan = make_plan(shape, trainer, servers, work, gpu, assume)
    if plan.faults:
        raise UserError("; ".join(plan.faults) + "; megatron-r1 plan says what would fit")
    assert plan.time and plan.sync and plan.server and trainer and servers
    stages = pipeline_chunks(shape, trainer.parallel)
    passes = [
        rank_passes(
            shape, trainer.parallel, chunks, gpu, assume, row_tokens=trainer.row_tokens * assume.rows_filled,
            context=min(work.context_per_token, trainer.row_tokens), recompute=trainer.recompute == "full",
            flops=gpu.fp8_flops if trainer.dtype == "fp8" else gpu.bf16_flops,
        )
        for chunks in stages
    ]  # fmt: skip
    slots = one_forward_one_backward(
        [each.forward for each in passes], [each.backward for each in passes], plan.time.microbatches
    )
    training = work.optimizer_steps * max(slot.end for slot in slots) + plan.time.reduction
    phases = (training + plan.time.scoring + plan.time.swap, plan.sync.seconds / work.sync_every)
    cost = server_cost(shape, servers, gpu, assume)
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("synchronous", {}),
        ("async, one step ahead", {"ahead": True}),
        ("partial rollouts", {"carry": True}),
        ("oversampled", {"more": OVERSAMPLED}),
        ("async + partial", {"ahead": True, "carry": True}),
    )
    cache = plan.server.cache_tokens
    walked = [_walk(name, work, servers, cost, cache, phases, steps, seed, **way) for name, way in ways]
    return walked, slots, plan


def _walk(
    name: str,
    work: Workload,
    servers: ServerSetup,
    cost: StepCost,
    cache: int,
    phases: tuple[float, float],
    steps: int,
    seed: int,
    *,
    ahead: bool = False,
    carry: bool = False,
    more: float = 1.0,
) -> Walked:
    trainer, sync = phases
    # Partial rollouts keep the servers as full as oversampling does, without losing what is not finished.
    started = round(work.samples * (OVERSAMPLED if carry else more))
    left: list[Request] = []
    rollouts, wasted, sampled, stale, trained = [], 0, 0, 0, 0
    first = None
    for step in range(steps):
        lengths = replace(work, samples=started).lengths(seed + step)
        longest = servers.max_model_len - work.prompt_tokens
        fresh = [
            Request(index=step * started + i, prompt_tokens=work.prompt_tokens, length=min(length, longest))
            for i, length in enumerate(lengths[: started - len(left)])
        ]
        requests = [*left, *fresh]
        before = {request.index: request.done for request in requests}
        done = simulate(
            requests, num_servers=servers.num_servers, cost=cost, max_running=servers.max_running, cache_tokens=cache,
            enough=work.samples,
        )  # fmt: skip
        first = first or done
        unfinished = {request.index for request in done.unfinished}
        finished = [request for request in requests if request.index not in unfinished]
        trained += sum(request.length for request in finished)
        stale += sum(request.length if ahead else before[request.index] for request in finished)
        sampled += done.tokens
        left = done.unfinished if carry else []
        if not carry:
            wasted += sum(request.done for request in done.unfinished)
        rollouts.append(done.seconds)
    assert first is not None
    rollout = float(np.mean(rollouts))
    whole = max(rollout, trainer) + sync if ahead else rollout + trainer + sync
    return Walked(
        name=name, rollout=rollout, trainer=trainer, sync=sync, step=whole, wasted=wasted / max(1, sampled),
        stale=stale / max(1, trained), overlapped=ahead, first=first,
    )  # fmt: skip


def text(walked: list[Walked], slots: list[Slot], plan: Plan) -> str:
    base = walked[0].step
    end = max(slot.end for slot in slots)
    ranks = 1 + max(slot.rank for slot in slots)
    busy = sum(slot.end - slot.start for slot in slots)
    lines = [
        f"{'way':24s} {'rollout':>9s} {'trainer':>9s} {'sync':>7s} {'step':>9s} {'saved':>6s} {'wasted':>7s} stale"
    ]
    for way in walked:
        lines.append(
            f"{way.name:24s} {way.rollout:9,.1f} {way.trainer:9,.1f} {way.sync:7,.1f} {way.step:9,.1f} "
            f"{1 - way.step / base:6.1%} {way.wasted:7.1%} {way.stale:5.1%}"
        )
    first = walked[0].first
    idle = first.idle_server_seconds / (first.seconds * (1 + max(span.server for span in first.spans)))
    lines += [
        "seconds; one trainer phase is logprobs, training and its reductions",
        f"1F1B: {end:,.1f} s an optimizer step, pipeline ranks busy {busy / (ranks * end):.1%} of it",
        f"first rollout: {first.tokens:,} tokens, {first.preemptions:,} preemptions, servers without work {idle:.1%}, "
        f"half of the answers after {_quantile(first, 0.5):,.0f} s, 90% after {_quantile(first, 0.9):,.0f} s, all "
        f"after {first.seconds:,.0f} s",
        f"planner's closed form: step {plan.seconds:,.1f} s",
    ]
    return "\n".join(lines)


def _quantile(done: Timeline, share: float) -> float:
    return float(np.quantile([span.end for span in done.spans if span.finished], share))


# ---- measured timelines


def record(out: Path, runs: list[Path]) -> int:
    """Rollout seconds and lengths of every step of runs that logged all their completions."""
    found = []
    for run in runs:
        config = json.loads((run / "run.json").read_text())["config"]
        lengths: dict[int, list[int]] = {}
        for line in (run / "rollouts.jsonl").read_text().splitlines():
            row = json.loads(line)
            lengths.setdefault(row["step"], []).append(row["tokens"])
        for line in (run / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            own = lengths[row["step"]]
            if sum(own) != row["completion_tokens"]:
                raise UserError(f"{run}: logged {len(own)} completions a step; set grpo.rollouts_logged_per_step")
            found.append(
                {
                    "seats": config["rollout"]["max_num_seqs"],
                    "step": row["step"],
                    "prompt_tokens": row["tokens"] - row["completion_tokens"],
                    "seconds": round(row["seconds"]["rollout"], 4),
                    "lengths": own,
                }
            )
    out.write_text("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in found) + "\n]\n")
    print(f"{out}: {len(found)} rollouts")
    return 0


def predicted(row: dict, cost: StepCost) -> Timeline:
    """The simulated rollout of a measured one: its lengths, its seats, a cache that was never full."""
    each = row["prompt_tokens"] / len(row["lengths"])
    requests = [Request(index=i, prompt_tokens=each, length=length) for i, length in enumerate(row["lengths"])]
    return simulate(requests, num_servers=1, cost=cost, max_running=row["seats"], cache_tokens=1 << 40)


def calibrate(rows: list[dict]) -> LinearCost:
    """Least squares of seconds on the simulated numbers of steps and tokens, each row weighted by 1 / its seconds."""
    counts = [(predicted(row, LinearCost(step=1.0, token=0.0)).seconds, sum(row["lengths"])) for row in rows]
    seconds = np.array([row["seconds"] for row in rows])
    (step, token), *_ = np.linalg.lstsq(np.array(counts) / seconds[:, None], np.ones(len(rows)), rcond=None)
    return LinearCost(step=float(step), token=float(token))


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(rows to calibrate on, rows to predict): every second step of the fewest and of the most seats; the rest, in
    which the seats between were never seen."""
    seats = sorted({row["seats"] for row in rows})
    seen = [row for row in rows if row["seats"] in (seats[0], seats[-1]) and row["step"] % 2 == 0]
    return seen, [row for row in rows if row not in seen]


def check(timeline: Path) -> int:
    rows = json.loads(timeline.read_text())
    seen, unseen = split(rows)
    cost = calibrate(seen)
    print(f"calibrated on {len(seen)} rollouts: {cost.step * 1e3:.2f} ms per step, {cost.token * 1e3:.3f} ms per token")
    for seats in sorted({row["seats"] for row in rows}):
        errors = [predicted(row, cost).seconds / row["seconds"] - 1 for row in unseen if row["seats"] == seats]
        print(
            f"{seats:4d} seats: {len(errors)} rollouts predicted, error mean {np.mean(errors):+.1%}, "
            f"mean magnitude {np.mean(np.abs(errors)):.1%}, worst {max(errors, key=abs):+.1%}"
        )
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except UserError as error:
        print(f"simulate_cluster: {error}", file=sys.stderr)
        raise SystemExit(2) from None
