"""R1-Zero: GRPO on a base model with rule rewards (paper, section 2.2). Runs on every trainer rank.

The embedded default first makes its base model by a short supervised warm-up (sft.steps > 0), because no pretrained
mixture of experts fits on two cores; a real run starts from a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_r1.config.schema import ModelConfig, RunConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.data.demonstrations import demonstration_batch
from megatron_r1.data.packing import RowLayout
from megatron_r1.data.problems import ProblemSplit, load_problems
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.template import PromptRoom, render_prompt
from megatron_r1.data.tokenizer import Tokenizer, load_tokenizer
from megatron_r1.errors import EngineError
from megatron_r1.grpo.advantage import group_advantages
from megatron_r1.observe.metrics import JsonLines, write_json
from megatron_r1.observe.progress import Progress, duration
from megatron_r1.observe.report import write_report
from megatron_r1.observe.rollouts import rollout_records
from megatron_r1.pipeline.servers import (
    server_devices,
    start_reward_models,
    start_rollouts,
    start_teacher,
    wait_for_graders,
)
from megatron_r1.pipeline.trainer import EXPORT_DTYPE, build_policy, printer, row_layout
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import on_rank_zero
from megatron_r1.rewards.compose import Scorer, check_preference_problems
from megatron_r1.rollout.preference import RewardModelServer
from megatron_r1.rollout.server import Engine
from megatron_r1.rollout.sync import WeightSync
from megatron_r1.stages.collector import Collector
from megatron_r1.stages.distill import add_teacher_logprobs
from megatron_r1.stages.evaluate import greedy_scores
from megatron_r1.stages.grpo import ASIDE, Loop, train_grpo
from megatron_r1.stages.sft import train_sft
from megatron_r1.types import RolloutGroup, StepResult, TrainingSequence
from megatron_r1.weights.export import save_hf_folder


def run_zero(config: RunConfig, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    """The whole run on this rank; the folder is prepared. Returns the summary (also in summary.json, on rank 0)."""
    begun = time.perf_counter()
    say = printer()
    tokenizer = load_tokenizer(config.model.path)
    room = PromptRoom(
        template=config.data.template,
        tokenizer=tokenizer,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        max_model_len=config.rollout.max_model_len,
    )
    split = load_problems(config.data, room)
    check_preference_problems(split.with_grader("preference"), config.rewards)
    if split.num_unusable:
        say(f"{split.num_unusable} of {len(split)} problems leave no room for an answer and are left out")
    if split.num_overlapping:
        say(f"{split.num_overlapping} of {len(split)} problems ask what a held-out one asks and are passed over")
    layout = row_layout(config, tokenizer.pad_id)
    seconds: dict[str, float] = {}
    model = dataclasses.replace(config.model, train_mtp=False)
    if config.sft.steps or config.model.initialise == "random":
        # The servers start from a folder, so random weights are written to one too.
        base = config.run_dir / "base"
        steps = f"{config.sft.steps} supervised steps make" if config.sft.steps else "random weights are"
        say(f"warm-up: {steps} the base model")
        _warm_up(config, shape, device, tokenizer, split, layout, base, say)
        model = dataclasses.replace(model, path=base, load_from=None, initialise="weights")
        seconds["warm_up"] = time.perf_counter() - begun
    base = model.path
    made: list[Scorer] = []
    judges: list[RewardModelServer] = []

    teachers: list[Engine] = []

    def make_scorer() -> None:
        teachers.extend(start_teacher(config))
        judges.extend(start_reward_models(config))
        made.append(
            Scorer(
                config.rewards,
                programs=split.with_grader("code"),
                preferences=judges,
                instructions=bool(split.with_grader("instructions")),
            )
        )

    engines: Sequence[Engine] = ()
    try:
        on_rank_zero(make_scorer)
        scorer = made[0] if made else None
        say(f"starting {config.rollout.num_engines} vLLM server(s) on {base}")
        marked = time.perf_counter()
        policy, engines = _policy_and_engines(config, shape, device, model, say)
        on_rank_zero(lambda: wait_for_graders(scorer, [*(judge.engine for judge in judges), *teachers]))
        seconds["start"] = time.perf_counter() - marked
        sync = WeightSync(
            config.rollout,
            source=policy.weights(
                dtype=EXPORT_DTYPE[config.rollout.dtype], bucket_bytes=config.rollout.sync_bucket_mib << 20
            ),
            engines=engines,
            model_path=base,
            rank=dist.get_rank(),
        )
        collector = Collector(
            rollout=config.rollout, data=config.data, tokenizer=tokenizer, sync=sync, engines=engines, scorer=scorer
        )
        stream = ProblemStream(split, seed=config.seed)
        run = _Run(config, policy, collector, sync, tokenizer, stream, base, teachers)
        summary = run.train(layout, split, seconds, say)
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
        report = write_report(config.run_dir)
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        say(f"held-out greedy accuracy {before:.1%} -> {after:.1%} in {duration(summary['seconds_total'])}")
        say(f"report: {report}")
    return summary


def _policy_and_engines(
    config: RunConfig, shape: ModelShape, device: torch.device, model: ModelConfig, say: Callable[[str], None]
) -> tuple[Policy, Sequence[Engine]]:
    """Servers start in the background on rank 0 while every rank builds and loads the trainer's model."""
    with ThreadPoolExecutor(1) as background:
        starting = None
        if dist.get_rank() == 0:
            starting = background.submit(
                start_rollouts,
                config.rollout,
                model_path=model.path,
                run_dir=config.run_dir,
                seed=config.seed,
                visible_devices=server_devices(config),
            )
        try:
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


def _warm_up(
    config: RunConfig,
    shape: ModelShape,
    device: torch.device,
    tokenizer: Tokenizer,
    split: ProblemSplit,
    layout: RowLayout,
    base: Path,
    say: Callable[[str], None],
) -> None:
    """Supervised steps on noisy demonstrations, then the base model as a Hugging Face folder."""
    sft = config.sft
    policy = build_policy(
        config, shape, device, model=config.model, optimizer=sft.optimizer, total_steps=sft.steps, temperature=1.0
    )
    # Another order than GRPO's, and never a held-out problem.
    stream = ProblemStream(split, seed=config.seed + 1)

    def batches() -> Iterator[Sequence[TrainingSequence]]:
        for step in range(sft.steps):
            yield demonstration_batch(
                stream.take(sft.batch_size),
                tokenizer=tokenizer,
                template=config.data.template,
                noise=sft.noise,
                seed=[config.seed, step],
            )

    begun = time.perf_counter()

    def on_step(step: int, result: StepResult) -> None:
        done = step + 1
        if done % max(1, sft.steps // 10) == 0:
            left = (time.perf_counter() - begun) / done * (sft.steps - done)
            say(f"  warm-up {done}/{sft.steps}  loss {result.loss:.3f}  left {duration(left)}")

    train_sft(policy, batches(), layout, on_step)
    stream_out = policy.weights(dtype=EXPORT_DTYPE[config.rollout.dtype], include_mtp=True)
    save_hf_folder(stream_out, config.model.path, base, extra={"stage": "warm_up", "steps": sft.steps})
    dist.barrier()


class _Run:
    """GRPO of one run: what the loop calls, and the files that it fills."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        collector: Collector,
        sync: WeightSync,
        tokenizer: Tokenizer,
        stream: ProblemStream,
        base: Path,
        teachers: Sequence[Engine] = (),
    ) -> None:
        self.teachers = teachers
        self.config, self.policy, self.collector, self.sync = config, policy, collector, sync
        self.tokenizer, self.stream, self.base = tokenizer, stream, base
        self.is_writer = dist.get_rank() == 0
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self.sync_milliseconds: list[float] = []

    def train(
        self, layout: RowLayout, split: ProblemSplit, seconds: dict[str, float], say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Evaluate, train, export, evaluate. Returns the summary.

        If the servers are lost on the way, what was trained is exported first, then the error is raised."""
        config, held_out = self.config, split.held_out
        self.push(0)
        marked = time.perf_counter()
        before = greedy_scores(self.collector, held_out)
        seconds["evaluate"] = time.perf_counter() - marked
        say(f"held-out greedy accuracy before GRPO: {before['accuracy']:.1%} of {len(held_out)} problems")
        with ExitStack() as files:
            if self.is_writer:
                self.metrics = files.enter_context(JsonLines(config.run_dir / "metrics.jsonl"))
                self.rollouts = files.enter_context(JsonLines(config.run_dir / "rollouts.jsonl"))
                self.progress = files.enter_context(Progress(config.grpo.steps))
            loop = Loop(
                stream=self.stream,
                collector=self.collector,
                push=self.push,
                on_step=self.on_step,
                evaluate=lambda: greedy_scores(self.collector, split.validation)["accuracy"],
                save=self.save,
                decode=self.tokenizer.decode,
                teach=self.teach if config.teacher.model is not None else None,
            )
            try:
                steps = train_grpo(
                    self.policy,
                    config.grpo,
                    layout,
                    loop,
                    max_new_tokens=config.rollout.sampling.max_new_tokens,
                    seed=config.seed,
                )
            except EngineError:
                if self.policy.steps_taken:
                    self.save(self.policy.steps_taken // config.grpo.minibatches)
                raise
        self.save(steps, last=True)
        marked = time.perf_counter()
        after = greedy_scores(self.collector, held_out)
        seconds["evaluate"] += time.perf_counter() - marked
        grpo_seconds = sum(value for phase, value in self.seconds.items() if phase not in ASIDE)
        for phase, value in self.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
        return {
            "accuracy_before": before["accuracy"],
            "accuracy_after": after["accuracy"],
            "held_out_before": before,
            "held_out_after": after,
            "steps": steps,
            "seconds": seconds,
            "tokens_per_second": self.tokens / max(grpo_seconds, 1e-9),
            "sync_milliseconds_median": float(np.median(self.sync_milliseconds)),
            "held_out": len(held_out),
        }

    def push(self, version: int) -> None:
        """Weights to every server; a server that died meanwhile, or dies of it, is restarted and pushed to again.

        Raises EngineError on every rank when a server is past its restarts or the second push fails too.
        """
        for attempt in range(2):
            on_rank_zero(self._revive)
            failure: EngineError | None = None
            try:
                report = self.sync.push(version)
                self.sync_milliseconds.append(report.seconds * 1e3)
            except EngineError as error:  # on rank 0 only: the others' part of the push is done
                failure = error
            failure = on_rank_zero(lambda: failure)  # noqa: B023 - called at once
            if failure is None:
                return
            if attempt == 1:
                raise EngineError(f"weight sync failed twice; {failure}") from failure

    def _revive(self) -> None:
        for engine in self.sync.engines:
            if not engine.alive():
                engine.restart()

    def teach(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with the teacher's logprobs; rank 0 asks, all get them. A collective."""
        return on_rank_zero(lambda: add_teacher_logprobs(self.teachers[0], groups))

    def save(self, step: int, *, last: bool = False) -> None:
        target = self.config.run_dir / ("policy" if last else f"policy_step_{step:06d}")
        dtype = EXPORT_DTYPE[self.config.rollout.dtype]
        stream = self.policy.weights(dtype=dtype, include_mtp=True)
        save_hf_folder(stream, self.base, target, extra={"stage": "grpo", "step": step})

    def on_step(self, step: int, metrics: dict[str, Any], groups: list[RolloutGroup]) -> None:
        for phase, value in metrics["seconds"].items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        self.tokens += metrics["tokens"]
        if not self.is_writer:
            return
        self.metrics.write({"step": step, **metrics})
        records = rollout_records(
            step=step,
            groups=groups,
            advantages=[
                group_advantages(np.array([r.total for r in group.rewards]), self.config.grpo.advantage).tolist()
                for group in groups
            ],
            prompt_texts=[render_prompt(group.problem, self.config.data.template, self.tokenizer) for group in groups],
            limit=self.config.grpo.rollouts_logged_per_step,
        )
        for record in records:
            self.rollouts.write(record)
        self.progress.update(step, metrics)
        if metrics["skipped_steps"]:
            self.progress.note(f"  {metrics['skipped_steps']} optimizer step(s) skipped: the gradient was not finite")
