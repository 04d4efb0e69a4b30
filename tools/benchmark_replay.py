"""Measure what routing replay and the mismatch metrics add to a GRPO step, in one run.

usage: python tools/benchmark_replay.py [--repeats 10] [--prompts 32] [--group-size 16] [--json OUT]

Two servers of the recipe `tiny`'s model (random weights), one of which returns the experts of its tokens, answer the
same prompts with the same seeds; then one policy trains on the rows without experts, and on the rows with them,
replayed and measured (the mismatch, routes that differ). All four are interleaved, in turns of order. Medians of
wall-clock seconds and CPU-seconds of the process tree; the shares are of the step without. On CPUs, trains on one rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_throughput import tree_cpu_seconds

from megatron_r1.config import ParallelConfig, load_shape
from megatron_r1.policy.platform import configure_process
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.grpo.config import GRPOConfig

SIDES = ("without", "with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    config = RECIPES["tiny"]()
    assert isinstance(config, GRPOConfig)
    with tempfile.TemporaryDirectory() as scratch:
        threads = len(os.sched_getaffinity(0))
        config = dataclasses.replace(
            config,
            run_dir=Path(scratch) / "run",
            parallel=ParallelConfig(),
            prompts_per_step=arguments.prompts,
            group_size=arguments.group_size,
            train=dataclasses.replace(config.train, threads_per_rank=threads),
        )
        configure_process(threads=threads, cpu=True)
        found = measure(config, arguments.repeats, Path(scratch))
    for line in table(found):
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(config: GRPOConfig, repeats: int, scratch: Path) -> dict[str, Any]:
    """Medians by part and side: seconds and CPU-seconds; what a step has."""
    import torch

    from megatron_r1.data.packing import pack_rank
    from megatron_r1.data.problems import load_problems
    from megatron_r1.data.stream import ProblemStream
    from megatron_r1.data.tokenizer import load_tokenizer
    from megatron_r1.engines.base import EngineSpec, start_all
    from megatron_r1.engines.vllm.server import LocalEngine
    from megatron_r1.policy import topology
    from megatron_r1.rewards.wiring import scorer_for
    from megatron_r1.rollout.routes import RouteForm
    from megatron_r1.stages.common.trainer import build_policy, row_layout
    from megatron_r1.stages.grpo.collector import Collector
    from megatron_r1.stages.grpo.loss import policy_loss
    from megatron_r1.stages.grpo.mismatch import measure as measure_mismatch
    from megatron_r1.stages.grpo.recorded import KeptWeights
    from megatron_r1.stages.grpo.sequences import add_logprobs, to_sequences
    from megatron_r1.stages.grpo.usable import advantages_of
    from megatron_r1.weights.save import save_hf_folder

    topology.initialise(config.parallel, seed=0, cpu=True)
    shape, tokenizer = load_shape(config.model.path), load_tokenizer(config.model.path)
    policy = build_policy(config, shape, torch.device("cpu"), model=config.model, total_steps=1000, replay_routes=True)
    base = scratch / "base"
    save_hf_folder(policy.weights(dtype=torch.float32, include_mtp=True), config.model.path, base)
    split, algorithm = load_problems(config.data), config.algorithm
    stream, layout = ProblemStream(split, seed=0), row_layout(config, tokenizer.pad_id, vocab_size=shape.vocab_size)
    clock, longest = Clock(), config.rollout.sampling.max_new_tokens
    rollouts = {
        side: dataclasses.replace(config.rollout, routes="off" if side == "without" else "replay") for side in SIDES
    }
    engines = {
        side: LocalEngine(EngineSpec(config=rollout, model_path=base, run_dir=config.run_dir, name=f"vllm-{side}"))
        for side, rollout in rollouts.items()
    }
    start_all(list(engines.values()))
    policy.refresh_reference()
    loss = policy_loss(algorithm, own_is_old=True)
    tokens = 0
    try:
        with scorer_for(config.rewards, split.known()) as scorer:
            collectors = {
                side: Collector(
                    rollout=rollouts[side], data=config.data, tokenizer=tokenizer, sync=KeptWeights([engines[side]]),
                    engines=[engines[side]], scorer=scorer, routes=RouteForm.of(shape) if side == "with" else None,
                )
                for side in SIDES
            }  # fmt: skip
            for repeat in range(repeats + 1):  # the first warms up and is thrown away
                problems = stream.take(config.prompts_per_step)
                order = SIDES if repeat % 2 else SIDES[::-1]
                rows = {}
                for side in order:
                    collect = functools.partial(collectors[side].collect, group_size=config.group_size, step=repeat)
                    found = clock.time("rollout", side, lambda: collect(problems, seed=repeat * 100_000))  # noqa: B023
                    part = [(g, advantages_of(algorithm, algorithm.rewards(g, longest))) for g in found.groups]
                    rows[side] = clock.time(
                        "packing",
                        side,
                        lambda: pack_rank(to_sequences(part, algorithm, longest), layout, rank=0, num_ranks=1),  # noqa: B023
                    )
                    tokens = sum(len(g.prompt_ids) + len(c.token_ids) for g in found.groups for c in g.completions)
                for side in order:
                    (ready,) = clock.time("reference", side, lambda: add_logprobs(policy, [rows[side]], algorithm))  # noqa: B023

                    def inspect(logprobs) -> None:
                        measure_mismatch(ready, logprobs)  # noqa: B023
                        policy.routes_differ()

                    look = inspect if side == "with" else None
                    clock.time("train", side, lambda: policy.step(ready, loss, inspect=look))  # noqa: B023
    finally:
        for engine in engines.values():
            engine.stop()
    topology.finalise()
    return {
        "tokens": tokens,
        "bytes_per_token": RouteForm.of(shape).bytes_per_token,
        "repeats": repeats,
        "seconds": clock.medians(clock.seconds),
        "cpu_seconds": clock.medians(clock.cpu),
    }


class Clock:
    """Seconds by part and side."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.cpu: dict[tuple[str, str], list[float]] = {}

    def time(self, part: str, side: str, work: Callable[[], Any]) -> Any:
        cpu, begun = tree_cpu_seconds(), time.perf_counter()
        value = work()
        self.seconds.setdefault((part, side), []).append(time.perf_counter() - begun)
        self.cpu.setdefault((part, side), []).append(tree_cpu_seconds() - cpu)
        return value

    @staticmethod
    def medians(lists: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, float]]:
        parts = dict.fromkeys(part for part, _ in lists)
        return {part: {side: statistics.median(lists[part, side][1:]) for side in SIDES} for part in parts}


def table(found: dict[str, Any]) -> list[str]:
    """The table of docs/mismatch.md."""
    lines = [
        f"{found['tokens']:,} tokens a step, {found['bytes_per_token']} bytes of experts per token, medians of "
        f"{found['repeats']} interleaved repeats",
        "| part | without, s | with, s | CPU without, s | CPU with, s |",
        "| --- | --- | --- | --- | --- |",
    ]
    whole = {}
    for kind in ("seconds", "cpu_seconds"):
        whole[kind] = {side: sum(part[side] for part in found[kind].values()) for side in SIDES}
    rows = {**{part: [found[kind][part] for kind in whole] for part in found["seconds"]}, "step": list(whole.values())}
    for part, (wall, cpu) in rows.items():
        lines.append(
            f"| {part} | {wall['without']:.3f} | {wall['with']:.3f} | {cpu['without']:.3f} | {cpu['with']:.3f} |"
        )
    shares = [whole[kind]["with"] / whole[kind]["without"] - 1 for kind in whole]
    lines.append(f"the step takes {shares[0]:+.1%} of its time, {shares[1]:+.1%} of its CPU-seconds")
    return lines


if __name__ == "__main__":
    main()
