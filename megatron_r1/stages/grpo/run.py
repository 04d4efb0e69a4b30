"""GRPO from end to end (R1-Zero: paper, section 2.2; R1's RL: sections 2.3.2 and 2.3.4). Runs on every trainer rank.

Here is what a run begins and ends with: problems, graders, servers, the trainer's model. The loop is in loop.py, what
it calls in training.py.
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

from megatron_r1.agreement import on_rank_zero
from megatron_r1.config.engines import engine_entry
from megatron_r1.config.model_folder import power_of_two_scales
from megatron_r1.config.schema import ModelConfig, RolloutConfig
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.data.problems import ProblemSplit
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.tokenizer import Tokenizer, load_tokenizer
from megatron_r1.engines.base import Engine
from megatron_r1.engines.chosen import engine_kind
from megatron_r1.engines.quantised import QuantisedSource
from megatron_r1.engines.source import ShardedSource, read_shapes
from megatron_r1.observe.metrics import write_json
from megatron_r1.observe.progress import duration
from megatron_r1.observe.report import write_report
from megatron_r1.observe.watch import Watch
from megatron_r1.policy.policy import Policy
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.recording import Recording
from megatron_r1.stages.common.checkpoints import oldest_step
from megatron_r1.stages.common.servers import start_rollouts
from megatron_r1.stages.common.trainer import EXPORT_DTYPE, build_policy, export, printer, row_layout
from megatron_r1.stages.grpo.collector import Collector
from megatron_r1.stages.grpo.colocation import Colocation, ResidentSource
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.graders import Graders, problems_of, stop_all
from megatron_r1.stages.grpo.recorded import KeptWeights, route_form, sample_only
from megatron_r1.stages.grpo.servers import served_folder, server_devices
from megatron_r1.stages.grpo.training import GRPORun


def run_grpo(config: GRPOConfig, shape: ModelShape | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """The whole run on this rank, or with rollout_only in the one process; the folder is prepared. Returns the summary
    (also in summary.json, on rank 0)."""
    if shape is None or device is None:
        return sample_only(config)
    rank = dist.get_rank()
    deadlines = config.deadlines.by_phase(rank)
    with Watch(config.run_dir, rank=rank, deadlines=deadlines, steps=config.steps) as watch:
        return _run(config, shape, device, watch, printer())


def _run(
    config: GRPOConfig, shape: ModelShape, device: torch.device, watch: Watch, say: Callable[[str], None]
) -> dict[str, Any]:
    begun = time.perf_counter()
    if config.keep_rollouts:
        on_rank_zero(lambda: Recording(config.run_dir).refuse_gap(oldest_step(config.run_dir)))
    tokenizer = load_tokenizer(config.model.path, thinking=config.data.thinking)
    split = problems_of(config, tokenizer, say) if config.train_only is None else None
    layout = row_layout(config, tokenizer.pad_id, vocab_size=shape.vocab_size)
    model = _start_model(config, shape, device, watch, say)
    graders = Graders()
    engines: Sequence[Engine] = ()
    watch.before_the_end(lambda: stop_all([*engines, *graders.engines]))
    try:
        if split is not None:
            on_rank_zero(lambda: graders.start(config, split))
            label = engine_entry(config.rollout.engine).label
            say(f"starting {config.rollout.num_engines} {label} server(s) on {model.path}")
        marked = time.perf_counter()
        with watch.phase("start"):
            policy, engines = _policy_and_engines(config, shape, device, model, say)
            on_rank_zero(graders.wait)
        seconds = {"start": time.perf_counter() - marked}
        run = _wired(config, policy, engines, graders, tokenizer, split, model.path, watch, say)
        summary = run.train(layout, split, seconds)
        run.sync.close()
    finally:
        stop_all(engines)
        graders.close()
    summary["seconds_total"] = time.perf_counter() - begun
    if dist.get_rank() == 0:
        write_json(config.run_dir / "summary.json", summary)
        Journal(config.run_dir).clear()
        report = write_report(config.run_dir)
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        done = "trained" if split is None else f"held-out greedy accuracy {before:.1%} -> {after:.1%}"
        say(f"{done} in {duration(summary['seconds_total'])}")
        say(f"report: {report}")
    return summary


def _start_model(
    config: GRPOConfig, shape: ModelShape, device: torch.device, watch: Watch, say: Callable[[str], None]
) -> ModelConfig:
    """The model that RL starts from. The servers start from a folder, so random weights are written to one, `base` in
    the run's folder. A collective."""
    if config.model.initialise != "random":
        return config.model
    base = config.run_dir / "base"
    if on_rank_zero(base.is_dir):  # it appears when it is whole: an earlier start of this run has made it
        say(f"the base model is {base}, as an earlier start made it")
    else:
        say("random weights are the base model")
        with watch.phase("start"):
            policy = build_policy(config, shape, device, model=config.model, total_steps=config.steps)
            export(policy, config.model.path, base, dtype=config.rollout.dtype, extra={"stage": "random"})
    return dataclasses.replace(config.model, path=base, load_from=None, initialise="weights")


def _wired(
    config: GRPOConfig,
    policy: Policy,
    engines: Sequence[Engine],
    graders: Graders,
    tokenizer: Tokenizer,
    split: ProblemSplit | None,
    base: Path,
    watch: Watch,
    say: Callable[[str], None],
) -> GRPORun:
    """What the loop is to call. A collective."""
    colocation = Colocation(config.rollout, config.train, policy, engines, say)
    colocation.started_asleep()
    sync = (
        KeptWeights()
        if config.train_only
        else engine_kind(config.rollout).weight_sync(
            config.rollout,
            source=ResidentSource(_source(config, policy), colocation.offload),
            engines=engines,
            model_path=served_folder(config, base),
            rank=dist.get_rank(),
        )
    )
    collector = Collector(
        rollout=config.rollout,
        data=config.data,
        tokenizer=tokenizer,
        sync=sync,
        engines=engines,
        scorer=graders.scorer,
        journal=Journal(config.run_dir) if config.checkpoint_every else None,
        routes=route_form(config, policy.shape),
        watch=watch,
        before=colocation.for_sampling,
        version=lambda: policy.steps_taken // config.minibatches,
    )
    stream = ProblemStream(split, seed=config.seed) if split is not None else None
    judges = [judge.engine for judge in graders.judges]
    return GRPORun(
        config, policy, collector, sync, colocation, tokenizer, stream, base, watch, say, graders.teachers, judges
    )


def _source(config: GRPOConfig, policy: Policy) -> ShardedSource:
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
    config: GRPOConfig, shape: ModelShape, device: torch.device, model: ModelConfig, say: Callable[[str], None]
) -> tuple[Policy, Sequence[Engine]]:
    """Servers start in the background on rank 0 while every rank builds and loads the trainer's model. Servers
    on the trainer's GPUs come first: at its start vLLM measures what memory is free, and a policy that grew
    meanwhile would spoil that."""
    with ThreadPoolExecutor(1) as background:
        starting = None
        if dist.get_rank() == 0 and config.train_only is None:
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
                total_steps=config.steps * config.minibatches,
                temperature=config.rollout.sampling.temperature,
                replay_routes=config.rollout.routes == "replay",
            )
        except BaseException:
            if starting is not None and starting.exception() is None:
                for engine in starting.result():
                    engine.stop()
            raise
        ready: list[Sequence[Engine]] = [()]

        def wait() -> None:
            if starting is not None:
                ready[0] = starting.result()

        on_rank_zero(wait)
    for engine in ready[0]:
        say(f"{engine.name} serves on {engine.where}")
    return policy, ready[0]
