"""R1-Zero: GRPO on a base model with rule rewards (paper, section 2.2). Runs on every trainer rank.

The embedded default first makes its base model by a short supervised warm-up (sft.steps > 0), because no pretrained
mixture of experts fits on two cores; a real run starts from a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.model_folder import power_of_two_scales
from megatron_r1.config.schema import ModelConfig, RolloutConfig, RunConfig
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.data.packing import RowLayout
from megatron_r1.data.problems import ProblemSplit, load_problems
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.template import PromptRoom
from megatron_r1.data.tokenizer import Tokenizer, load_tokenizer
from megatron_r1.observe.metrics import write_json
from megatron_r1.observe.progress import duration
from megatron_r1.observe.report import write_report
from megatron_r1.observe.watch import Watch
from megatron_r1.pipeline.colocation import Colocation, ResidentSource
from megatron_r1.pipeline.grpo_run import GRPORun
from megatron_r1.pipeline.servers import (
    server_devices,
    start_reward_models,
    start_rollouts,
    start_teacher,
    wait_for_graders,
)
from megatron_r1.pipeline.trainer import EXPORT_DTYPE, build_policy, printer, row_layout
from megatron_r1.pipeline.warm_up import warm_up
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import on_rank_zero
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rewards.wiring import check_problems, scorer_for
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.preference import RewardModelServer
from megatron_r1.rollout.quantised import QuantisedSource
from megatron_r1.rollout.server import Engine
from megatron_r1.rollout.source import WeightSource, read_shapes
from megatron_r1.rollout.sync import WeightSync
from megatron_r1.stages.collector import Collector


def run_zero(config: RunConfig, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    """The whole run on this rank; the folder is prepared. Returns the summary (also in summary.json, on rank 0)."""
    rank = dist.get_rank()
    deadlines = config.deadlines.by_phase(rank)
    with Watch(config.run_dir, rank=rank, deadlines=deadlines, steps=config.grpo.steps) as watch:
        return _run(config, shape, device, watch, printer())


def _run(
    config: RunConfig, shape: ModelShape, device: torch.device, watch: Watch, say: Callable[[str], None]
) -> dict[str, Any]:
    begun = time.perf_counter()
    tokenizer = load_tokenizer(config.model.path, thinking=config.data.thinking)
    room = PromptRoom(
        template=config.data.template,
        tokenizer=tokenizer,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        max_model_len=config.rollout.max_model_len,
    )
    split = load_problems(config.data, room)
    check_problems(split.known(), config.rewards, reward_models=True)
    if split.num_unusable:
        say(f"{split.num_unusable} of {len(split)} problems leave no room for an answer and are left out")
    if split.num_overlapping:
        say(f"{split.num_overlapping} of {len(split)} problems ask what a held-out one asks and are passed over")
    layout = row_layout(config, tokenizer.pad_id, vocab_size=shape.vocab_size)
    seconds: dict[str, float] = {}
    model = _start_model(config, shape, device, tokenizer, split, layout, watch, say)
    if model is not config.model:
        seconds["warm_up"] = time.perf_counter() - begun
    base = model.path
    made: list[Scorer] = []
    judges: list[RewardModelServer] = []
    teachers: list[Engine] = []

    def make_scorer() -> None:
        teachers.extend(start_teacher(config))
        judges.extend(start_reward_models(config))
        made.append(scorer_for(config.rewards, split.known(), preferences=judges))

    engines: Sequence[Engine] = ()

    def stop_servers() -> None:
        # A server that hangs would not notice that its parent has ended.
        servers = [*engines, *teachers, *(judge.engine for judge in judges)]
        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            list(threads.map(lambda engine: engine.stop(), servers))

    watch.before_the_end(stop_servers)
    try:
        on_rank_zero(make_scorer)
        scorer = made[0] if made else None
        say(f"starting {config.rollout.num_engines} vLLM server(s) on {base}")
        marked = time.perf_counter()
        with watch.phase("start"):
            policy, engines = _policy_and_engines(config, shape, device, model, say)
            on_rank_zero(lambda: wait_for_graders(scorer, [*(judge.engine for judge in judges), *teachers]))
        seconds["start"] = time.perf_counter() - marked
        colocation = Colocation(config.rollout, config.train, policy, engines, say)
        colocation.started_asleep()
        sync = WeightSync(
            config.rollout,
            source=ResidentSource(_source(config, policy), colocation.offload),
            engines=engines,
            model_path=served_folder(config, base),
            rank=dist.get_rank(),
        )
        collector = Collector(
            rollout=config.rollout,
            data=config.data,
            tokenizer=tokenizer,
            sync=sync,
            engines=engines,
            scorer=scorer,
            journal=Journal(config.run_dir) if config.checkpoint_every else None,
            watch=watch,
            before=colocation.for_sampling,
        )
        stream = ProblemStream(split, seed=config.seed)
        graders = [judge.engine for judge in judges]
        run = GRPORun(
            config, policy, collector, sync, colocation, tokenizer, stream, base, watch, say, teachers, graders
        )
        summary = run.train(layout, split, seconds)
        sync.close()
    finally:
        for engine in (*engines, *teachers):
            engine.stop()
        for judge in judges:
            judge.close()
        for scorer in made:
            scorer.close()
    summary["seconds_total"] = time.perf_counter() - begun
    if dist.get_rank() == 0:
        write_json(config.run_dir / "summary.json", summary)
        Journal(config.run_dir).clear()
        report = write_report(config.run_dir)
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        say(f"held-out greedy accuracy {before:.1%} -> {after:.1%} in {duration(summary['seconds_total'])}")
        say(f"report: {report}")
    return summary


def _start_model(
    config: RunConfig,
    shape: ModelShape,
    device: torch.device,
    tokenizer: Tokenizer,
    split: ProblemSplit,
    layout: RowLayout,
    watch: Watch,
    say: Callable[[str], None],
) -> ModelConfig:
    """The model that RL starts from: as configured, or made by a warm-up. A collective."""
    if not config.sft.steps and config.model.initialise != "random":
        return config.model
    # The servers start from a folder, so random weights are written to one too.
    base = config.run_dir / "base"
    if on_rank_zero(base.is_dir):  # it appears when it is whole: an earlier start of this run has made it
        say(f"the base model is {base}, as an earlier start made it")
    else:
        steps = f"{config.sft.steps} supervised steps make" if config.sft.steps else "random weights are"
        say(f"warm-up: {steps} the base model")
        with watch.phase("start"):
            warm_up(config, shape, device, tokenizer, split, layout, base, say, watch)
    return dataclasses.replace(config.model, path=base, load_from=None, initialise="weights")


def served_folder(config: RunConfig, base: Path) -> Path:
    """The folder that servers start from."""
    return config.rollout.fp8_folder or base


def _source(config: RunConfig, policy: Policy) -> WeightSource:
    """The policy's weights in the form that the servers take. A collective."""
    rollout = config.rollout
    stream = policy.weights(dtype=EXPORT_DTYPE[rollout.dtype], bucket_bytes=rollout.sync_bucket_mib << 20)
    if rollout.fp8_folder is None:
        return stream
    block = load_shape(rollout.fp8_folder).fp8_block
    assert block is not None  # validation has looked
    scales = power_of_two_scales(rollout.fp8_folder)
    return QuantisedSource(stream, read_shapes(rollout.fp8_folder), block=block, power_of_two=scales)


def put_to_sleep(engines: Sequence[Engine], rollout: RolloutConfig) -> None:
    """Of servers that have started. Level 1, whatever deeper is configured: nothing has brought other weights."""
    for engine in engines if rollout.sleep_level else ():
        engine.client.sleep(1)


def _policy_and_engines(
    config: RunConfig, shape: ModelShape, device: torch.device, model: ModelConfig, say: Callable[[str], None]
) -> tuple[Policy, Sequence[Engine]]:
    """Servers start in the background on rank 0 while every rank builds and loads the trainer's model. Servers
    on the trainer's GPUs come first: at its start vLLM measures what memory is free, and a policy that grew
    meanwhile would spoil that."""
    with ThreadPoolExecutor(1) as background:
        starting = None
        if dist.get_rank() == 0:
            starting = background.submit(
                start_rollouts,
                config.rollout,
                model_path=served_folder(config, model.path),
                run_dir=config.run_dir,
                seed=config.seed,
                visible_devices=server_devices(config),
            )
        try:
            if config.rollout.sync == "ipc":
                on_rank_zero(lambda: put_to_sleep(starting.result(), config.rollout) if starting is not None else None)
            policy = build_policy(
                config,
                shape,
                device,
                model=model,
                optimizer=config.optimizer,
                total_steps=config.grpo.steps * config.grpo.minibatches,
                temperature=config.rollout.sampling.temperature,
            )
        except BaseException:
            if starting is not None and starting.exception() is None:
                for engine in starting.result():
                    engine.stop()
            raise
        ready: list[Sequence[Engine]] = [()]

        def wait() -> None:
            assert starting is not None
            ready[0] = starting.result()

        on_rank_zero(wait)
    for engine in ready[0]:
        say(f"vllm-{engine.index} serves on {engine.host}:{engine.port}, log {engine.log_path}")
    return policy, ready[0]
