"""Sampling without training, and training without sampling: rollouts go to a folder and come from one.

`rollout_only` is a stage of one process: servers with the start model, graders, and rollout/recording.py's files.
`train_only` is GRPO without servers and graders: each step's groups and rewards are those of the folder. The tokens,
seeds and problems of a recorded step are those that a run would have sampled with the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.tokenizer import Tokenizer, load_tokenizer
from megatron_r1.engines.base import Engine, SyncReport
from megatron_r1.errors import DataError
from megatron_r1.observe.metrics import JsonLines, PhaseTimer, keep_steps, write_json
from megatron_r1.observe.progress import Progress, duration
from megatron_r1.observe.report import write_report
from megatron_r1.observe.tracking import MetricsLog
from megatron_r1.observe.watch import Watch
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.recording import RecordedStep, Recording
from megatron_r1.rollout.routes import RouteForm
from megatron_r1.stages.common.preempt import end_alone, listen
from megatron_r1.stages.common.sampling import running_engines
from megatron_r1.stages.grpo.collector import Collector, Rollout
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import header_of
from megatron_r1.stages.grpo.graders import Graders, problems_of, stop_all
from megatron_r1.stages.grpo.metrics import sample_metrics, timing
from megatron_r1.stages.grpo.sampling import Sampled, sample_step, wanted_at
from megatron_r1.stages.grpo.servers import served_folder
from megatron_r1.stages.grpo.shares import Trained, samples_shown
from megatron_r1.stages.grpo.teacher import add_teacher_logprobs
from megatron_r1.types import Problem


class KeptWeights:
    """The weight sync of engines that keep the weights of their start, or of none (engines.base.WeightSync)."""

    def __init__(self, engines: Sequence[Engine] = ()) -> None:
        self.engines, self.version = engines, 0

    def push(self, version: int, engines: Sequence[Engine] | None = None) -> SyncReport:
        """Nothing is sent."""
        del engines
        self.version = version
        return SyncReport(version=version, num_bytes=0, seconds=0.0)

    def close(self) -> None:
        """Nothing is open."""


def record(recording: Recording, step: int, sampled: Sampled) -> None:
    """Write a step's groups, those that are trained on as they are then: with a teacher's logprobs."""
    # By their tokens: a step may draw a problem twice, and a teacher adds to its groups but leaves those as they are.
    kept = {id(group.completions[0].token_ids): group for group in sampled.kept}
    places = [id(group.completions[0].token_ids) for group in sampled.groups]
    groups = [kept.get(place, group) for place, group in zip(places, sampled.groups, strict=True)]
    marks = [place in kept for place in places]
    recording.write(step, RecordedStep(groups=groups, kept=marks, rounds=sampled.rounds))


def recorded(recording: Recording, step: int) -> Sampled:
    """The step as it was sampled. DataError if it cannot be read."""
    found = recording.read(step)
    kept = [group for group, kept in zip(found.groups, found.kept, strict=True) if kept]
    return Sampled(groups=list(found.groups), kept=kept, rounds=found.rounds)


def sample_only(config: GRPOConfig) -> dict[str, Any]:
    """A run with rollout_only: sample, grade and keep config.steps rollouts; those that the folder has already are
    passed over. Returns the summary. PreemptedError if it is asked to end before (stages/common/preempt.py)."""
    with Watch(config.run_dir, rank=0, deadlines=config.deadlines.by_phase(0), steps=config.steps) as watch:
        return _sample_only(config, watch)


def _sample_only(config: GRPOConfig, watch: Watch) -> dict[str, Any]:
    begun = time.perf_counter()
    listen()
    shape = load_shape(config.model.path)
    tokenizer = load_tokenizer(config.model.path, thinking=config.data.thinking)
    split = problems_of(config, tokenizer, _say)
    recording, graders = Recording(config.run_dir), Graders()
    recording.begin(header_of(config, shape))
    try:
        graders.start(config, split)
        folder = served_folder(config, config.model.path)
        _say(f"starting {config.rollout.num_engines} server(s) on {folder}")
        with ExitStack() as servers:
            with watch.phase("start"):
                engines = servers.enter_context(
                    running_engines(config.rollout, folder=folder, run_dir=config.run_dir, seed=config.seed)
                )
                watch.before_the_end(lambda: stop_all([*engines, *graders.engines]))
                graders.wait()
            collector = Collector(
                rollout=config.rollout,
                data=config.data,
                tokenizer=tokenizer,
                sync=KeptWeights(engines),
                engines=engines,
                scorer=graders.scorer,
                journal=Journal(config.run_dir),
                routes=route_form(config, shape),
                watch=watch,
            )
            stream = ProblemStream(split, seed=config.seed)
            summary = _sample_steps(config, recording, collector, stream, graders, tokenizer, watch)
    finally:
        graders.close()
    summary["seconds_total"] = time.perf_counter() - begun
    write_json(config.run_dir / "summary.json", summary)
    Journal(config.run_dir).clear()
    _say(f"report: {write_report(config.run_dir)}")
    _say(f"{config.steps} rollouts in {recording.folder} in {duration(summary['seconds_total'])}")
    return summary


def route_form(config: GRPOConfig, shape: ModelShape) -> RouteForm | None:
    """What routes the run's completions must bring; None: none."""
    return RouteForm.of(shape) if config.rollout.routes != "off" else None


def _say(text: str) -> None:
    print(text, flush=True)


def _sample_steps(
    config: GRPOConfig,
    recording: Recording,
    collector: Collector,
    stream: ProblemStream,
    graders: Graders,
    tokenizer: Tokenizer,
    watch: Watch,
) -> dict[str, Any]:
    """All steps that the recording does not have; what it has of the summary."""
    timer, journal, rewards, tokens = PhaseTimer(around=watch.phase), Journal(config.run_dir), list[float](), 0
    done = min(recording.num_steps(), config.steps)
    if done:
        _say(f"{done} of {config.steps} steps are there")
    with ExitStack() as files:
        metrics = files.enter_context(MetricsLog(config, stage="grpo", say=_say, first_step=done))
        progress = files.enter_context(Progress(config.steps, first_step=done))
        keep_steps(config.run_dir / "rollouts.jsonl", done)
        shown = files.enter_context(JsonLines(config.run_dir / "rollouts.jsonl"))
        for step in range(config.steps):
            watch.step(step)
            known = recording.read(step) if step < done else None
            sampled = _sampled(config, collector, stream, timer, step, known)
            row = sample_metrics(sampled)
            rewards.append(row["reward_mean"])
            tokens += row["tokens"]
            if known is not None:
                continue
            if graders.teachers:
                with timer.phase("teacher"):
                    sampled.kept = add_teacher_logprobs(graders.teachers[0], sampled.kept)
            row |= sampled.grading | timing(timer.take(), sampled.reward_seconds, row["tokens"])
            metrics.write({"step": step, **row})
            trained = Trained.of(sampled.kept, config.algorithm, config.rollout.sampling.max_new_tokens)
            for sample in samples_shown(config, tokenizer, step, trained):
                shown.write(sample)
            record(recording, step, sampled)  # last: a run that goes on passes over the steps that are recorded
            journal.forget(step + 1)
            progress.update(step, row)
            if step + 1 < config.steps:
                end_alone(config.run_dir, step + 1)
        watch.step(config.steps)
    return {"steps": config.steps, "reward_mean": sum(rewards) / len(rewards), "tokens": tokens}


def _sampled(
    config: GRPOConfig,
    collector: Collector,
    stream: ProblemStream,
    timer: PhaseTimer,
    step: int,
    known: RecordedStep | None,
) -> Sampled:
    """The step's groups: sampled, or as they are `known`, with the same problems drawn."""

    def collect(problems: Sequence[Problem], *, group_size: int, seed: int, step: int, first: int) -> Rollout:
        if known is not None:
            groups = list(known.groups[first : first + len(problems)])
            if [group.problem.id for group in groups] != [problem.id for problem in problems]:
                raise DataError(f"step {step} was recorded of other problems: remove {config.run_dir}")
            return Rollout(groups=groups, reward_seconds=0.0, num_tokens=0, restarts=0, grading={})
        with timer.phase("rollout"):
            return collector.collect(problems, group_size=group_size, seed=seed, step=step, first=first)

    wanted = wanted_at(step, config.preference_from_step)
    return collector.together(
        lambda: sample_step(
            lambda count: stream.take(count, wanted),
            collect,
            config.algorithm,
            prompts=config.prompts_per_step,
            group_size=config.group_size,
            seed=config.seed,
            step=step,
        )
    )
