"""GRPO of one run: what the loop calls, the files that it fills, and what a restart needs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_r1.agreement import on_rank_zero
from megatron_r1.data.packing import RowLayout
from megatron_r1.data.problems import ProblemSplit
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.engines.base import Engine, WeightSync
from megatron_r1.errors import EngineError
from megatron_r1.observe.metrics import JsonLines, keep_steps
from megatron_r1.observe.progress import Progress
from megatron_r1.observe.tracking import MetricsLog
from megatron_r1.observe.watch import Watch
from megatron_r1.policy.policy import Policy
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.recording import Recording
from megatron_r1.stages.common.checkpoints import Checkpoints
from megatron_r1.stages.common.divergence import SkippedSteps
from megatron_r1.stages.common.greedy import greedy_scores
from megatron_r1.stages.common.preempt import Preemption
from megatron_r1.stages.common.trainer import export
from megatron_r1.stages.grpo import recorded
from megatron_r1.stages.grpo.collector import Collector
from megatron_r1.stages.grpo.colocation import Colocation
from megatron_r1.stages.grpo.config import GRPOConfig, GRPOLoopConfig
from megatron_r1.stages.grpo.faults import header_of
from megatron_r1.stages.grpo.loop import Loop, TrainingLoop
from megatron_r1.stages.grpo.metrics import ASIDE
from megatron_r1.stages.grpo.push import push_weights
from megatron_r1.stages.grpo.sampling import Sampled
from megatron_r1.stages.grpo.shares import Trained, samples_shown
from megatron_r1.stages.grpo.teacher import add_teacher_logprobs
from megatron_r1.stages.grpo.usable import left_out_note
from megatron_r1.types import Problem, RolloutGroup


class GRPORun:
    """One on every rank."""

    def __init__(
        self,
        config: GRPOConfig,
        policy: Policy,
        collector: Collector,
        sync: WeightSync,
        colocation: Colocation,
        tokenizer: Tokenizer,
        stream: ProblemStream | None,
        base: Path,
        watch: Watch,
        say: Callable[[str], None],
        teachers: Sequence[Engine] = (),
        judges: Sequence[Engine] = (),
    ) -> None:
        self.teachers, self.judges = teachers, judges
        self.config, self.policy, self.collector, self.sync = config, policy, collector, sync
        self.colocation = colocation
        self.tokenizer, self.stream, self.base, self.watch, self.say = tokenizer, stream, base, watch, say
        self.is_writer = dist.get_rank() == 0
        self.preemption = Preemption(config.run_dir, policy.device)
        self.skips = SkippedSteps(config.max_skipped_steps)
        self.journal = Journal(config.run_dir)
        self.checkpoints = Checkpoints(
            config.run_dir,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best_checkpoint,
            say=say,
            on_commit=self._forget,
        )
        self.steps_done = 0
        self.before: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self.sync_milliseconds: list[float] = []

    def train(self, layout: RowLayout, split: ProblemSplit | None, seconds: dict[str, float]) -> dict[str, Any]:
        """Evaluate, train, export, evaluate; or go on from the last checkpoint. Returns the summary. Without a `split`
        the rollouts are recorded ones and nothing is evaluated.

        If the servers are lost on the way, what was trained is exported first, then the error is raised."""
        config = self.config
        held_out = split.held_out if split is not None else ()
        with self.watch.phase("start"):
            state = self.checkpoints.load_latest(self.policy)
        if state is not None:
            self.load_state_dict(state)
        if self.is_writer:
            self.journal.keep_from(self.steps_done)
        if config.keep_rollouts:
            recording, shape = Recording(config.run_dir), self.policy.shape
            on_rank_zero(lambda: recording.go_on(header_of(config, shape), self.steps_done))
        self.watch.step(self.steps_done)
        with self.watch.phase("sync"):
            self.push(self.steps_done)
        if state is None and split is not None:
            self.before = self._judge(held_out)
            accuracy = self.before["accuracy"]
            self.say(f"held-out greedy accuracy before GRPO: {accuracy:.1%} of {len(held_out)} problems")
        self.loop_config = self._loop_config()
        with ExitStack() as files:
            if self.is_writer:
                self._open_files(files)
            try:
                steps = TrainingLoop(
                    self.policy,
                    config.algorithm,
                    self.loop_config,
                    layout,
                    self._loop(split),
                    max_new_tokens=config.rollout.sampling.max_new_tokens,
                    seed=config.seed,
                    first_step=self.steps_done,
                ).run()
            except EngineError:
                # Those that live may be sampling still, and would neither sleep nor leave their memory.
                on_rank_zero(lambda: [engine.stop() for engine in self.sync.engines])
                self.checkpoints.commit(wait=True)
                if self.policy.steps_taken:
                    self.save(self.policy.steps_taken // config.minibatches)
                raise
        with self.watch.phase("checkpoint"):
            self.checkpoints.close()
        with self.watch.phase("save"):
            self.save(steps, last=True)
        after = self._judge(held_out) if split is not None else {}
        grpo_seconds = sum(value for phase, value in self.seconds.items() if phase not in ASIDE)
        total = dict(seconds)
        for phase, value in self.seconds.items():
            total[phase] = total.get(phase, 0.0) + value
        return {
            "accuracy_before": self.before.get("accuracy"),
            "accuracy_after": after.get("accuracy"),
            "held_out_before": self.before,
            "held_out_after": after,
            "steps": steps,
            "seconds": total,
            "tokens_per_second": self.tokens / max(grpo_seconds, 1e-9),
            "sync_milliseconds_median": float(np.median(self.sync_milliseconds)),
            "held_out": len(held_out),
        }

    def _loop(self, split: ProblemSplit | None) -> Loop:
        """What the loop is wired to; without a `split` to recorded rollouts."""
        validation = split.validation if split is not None else ()
        return Loop(
            stream=self.stream,
            collect=self.collector.collect,
            together=self.collector.together,
            push=self.push,
            on_step=self.on_step,
            to_trainer=lambda keep_weights: self.colocation.for_training(keep_weights=keep_weights),
            evaluate=lambda: greedy_scores(self.collector, validation)["accuracy"],
            save=self.save,
            checkpoint=self.checkpoint,
            skips=self.skips,
            warn=self.say,
            decode=self.tokenizer.decode,
            recorded=self.recorded if split is None else None,
            record=self.record if self.config.keep_rollouts else None,
            teach=self.teach if self.config.teacher is not None else None,
            watch=self.collector.phase,
        )

    def _judge(self, problems: Sequence[Problem]) -> dict[str, Any]:
        marked = time.perf_counter()
        with self.watch.phase("evaluate"):
            scores = greedy_scores(self.collector, problems)
        self.seconds["evaluate"] = self.seconds.get("evaluate", 0.0) + time.perf_counter() - marked
        return scores

    def _loop_config(self) -> GRPOLoopConfig:
        """With recorded rollouts there are as many steps as were recorded, and nobody to evaluate."""
        config = self.config
        if config.train_only is None:
            return config
        there = on_rank_zero(Recording(config.train_only).num_steps)
        self.say(f"{there} recorded steps; {min(there, config.steps)} are trained on, and nothing is evaluated")
        return dataclasses.replace(config, steps=min(there, config.steps), eval_every=0, target_accuracy=0.0)

    def _open_files(self, files: ExitStack) -> None:
        log = MetricsLog(self.config, stage="grpo", say=self.say, first_step=self.steps_done)
        self.metrics = files.enter_context(log)
        path = self.config.run_dir / "rollouts.jsonl"
        keep_steps(path, self.steps_done)
        self.rollouts = files.enter_context(JsonLines(path))
        self.progress = files.enter_context(Progress(self.loop_config.steps, first_step=self.steps_done))

    # ---- what a restart needs

    def checkpoint(self, step: int, metrics: dict[str, Any]) -> None:
        """See Loop.checkpoint. A collective."""
        self.steps_done = step
        self.checkpoints.commit()
        if not self.config.synced_after(step):
            return  # after a restart the servers would sample from other weights than they do now
        due, asked = self.preemption.checkpoint_now(step, self.config.checkpoint_every)
        if due:
            self.colocation.for_training(keep_weights=True)
            self.checkpoints.save(step, self.policy, self.state_dict(), score=metrics.get("eval_accuracy"))
        if asked:
            self.checkpoints.commit(wait=True)
            self.preemption.end(step)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: what a restart needs besides the policy."""
        return {
            "steps_done": self.steps_done,
            "stream": self.stream.state_dict() if self.stream is not None else {},
            "skipped_in_a_row": self.skips.count,
            "before": self.before,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "sync_milliseconds": self.sync_milliseconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. DataError if it belongs to other data."""
        if self.stream is not None:
            self.stream.load_state_dict(state["stream"])
        self.steps_done, self.skips.count = state["steps_done"], state["skipped_in_a_row"]
        self.before, self.seconds, self.tokens = state["before"], dict(state["seconds"]), state["tokens"]
        self.sync_milliseconds = list(state["sync_milliseconds"])

    def _forget(self, oldest: int) -> None:
        if self.is_writer:
            self.journal.forget(oldest)

    # ---- what the loop calls

    def push(self, version: int) -> None:
        """See push_weights. A collective."""
        report = push_weights(self.sync, self.colocation, version)
        self.sync_milliseconds.append(report.seconds * 1e3)

    def record(self, step: int, sampled: Sampled) -> None:
        recorded.record(Recording(self.config.run_dir), step, sampled)

    def recorded(self, step: int) -> Sampled:
        assert self.config.train_only is not None
        return recorded.recorded(Recording(self.config.train_only), step)

    def teach(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with the teacher's logprobs, on rank 0."""
        return add_teacher_logprobs(self.teachers[0], groups)

    def save(self, step: int, *, last: bool = False) -> None:
        self.colocation.for_training(keep_weights=True)
        target = self.config.run_dir / ("policy" if last else f"policy_step_{step:06d}")
        export(self.policy, self.base, target, dtype=self.config.rollout.dtype, extra={"stage": "grpo", "step": step})

    def on_step(self, step: int, metrics: dict[str, Any], trained: Trained | None) -> None:
        """See Loop.on_step."""
        self.watch.step(step + 1)
        for judge in self.judges:
            judge.forgive()
        if trained is None:
            return
        for phase, value in metrics["seconds"].items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        self.tokens += metrics["tokens"]
        self.metrics.write({"step": step, **metrics})
        for row in samples_shown(self.config, self.tokenizer, step, trained):
            self.rollouts.write(row)
        self.progress.update(step, metrics)
        if metrics["skipped_steps"]:
            self.progress.note(
                f"  {metrics['skipped_steps']} optimizer step(s) skipped: the gradient was not finite, or nothing was "
                "left to train on"
            )
        if note := left_out_note(trained.groups, trained.advantages):
            self.progress.note(f"  {note}")
