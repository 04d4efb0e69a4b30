"""Rejection sampling from end to end, in one process: sample, grade, judge, select, mix, and say what became of it all.

Problems go through in rounds, so that memory does not grow with their number: at the end of a round its samples are
decided about and written. Left out: training on the result, and sampling from a server that already runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_r1.data.decontaminate import spoken_turns
from megatron_r1.data.dedup import SeenTexts
from megatron_r1.errors import EmptyStageError
from megatron_r1.observe.metrics import JsonLines, plain_json, write_json
from megatron_r1.rewards.judge import Judge, Judgement
from megatron_r1.rewards.wiring import scorer_for
from megatron_r1.stages.common.sampling import (
    Graded,
    SamplingProgress,
    running_engines,
    sample_and_grade,
)
from megatron_r1.stages.rejection.config import RejectionConfig
from megatron_r1.stages.rejection.inputs import RejectionInputs, read_inputs
from megatron_r1.stages.rejection.mix import mix, records
from megatron_r1.stages.rejection.select import Decision, Sample, first_reason, select
from megatron_r1.stages.rejection.yields import Yield, describe_yield
from megatron_r1.types import Problem

ROUND_SAMPLES = 65_536
"""Samples that are held at once."""


def run_rejection(config: RejectionConfig) -> dict[str, Any]:
    """Write samples.jsonl, kept.jsonl and yield.json to config.run_dir, which the caller has prepared. Returns what
    yield.json holds. EmptyStageError if no sample is kept (yield.json is written all the same); JudgeError, EngineError
    and DataError as their causes raise them."""
    begun = time.perf_counter()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    inputs = read_inputs(config)
    total = Yield()
    partial = config.run_dir / "kept.jsonl.partial"
    sampling_seconds = 0.0
    provenance = _provenance(config, inputs.folder)
    with JsonLines(config.run_dir / "samples.jsonl") as samples_file, JsonLines(partial) as kept_file:
        with contextlib.closing(_rounds(config, inputs)) as rounds:
            for graded_seconds, decisions in rounds:
                sampling_seconds += graded_seconds
                total.add(decisions)
                for decision in decisions:
                    samples_file.write(_sample_record(decision))
                    if decision.reason is None:
                        kept_file.write(_kept_record(decision, provenance))
        shares = mix(total.kept, inputs.others, weight=config.weight, seed=config.seed)
        for record in itertools.chain.from_iterable(map(records, shares)):
            kept_file.write(record)
    report = {
        "problems": inputs.counts,
        "contamination": inputs.contamination,
        "yield": total.as_json(),
        "mix": [share.as_json() for share in shares],
        "judge": dict(inputs.judge.counts) if inputs.judge else {},
        "seconds": {"sampling": sampling_seconds, "all": time.perf_counter() - begun},
        "provenance": provenance,
    }
    write_json(config.run_dir / "yield.json", report)
    counts = report["yield"]["all"]
    write_json(config.run_dir / "summary.json", {name: counts[name] for name in ("problems", "samples", "kept")})
    if not total.kept:
        partial.unlink()
        raise EmptyStageError(f"{config.name}: no sample was kept.\n{describe_yield(report)}\nSee docs/rejection.md.")
    os.replace(partial, config.run_dir / "kept.jsonl")
    print(describe_yield(report), flush=True)
    return report


def _rounds(config: RejectionConfig, inputs: RejectionInputs) -> Generator[tuple[float, list[Decision]], None, None]:
    """Seconds of generation and the decisions about all samples, round by round. The servers stop with the last."""
    problems, seen = inputs.problems, SeenTexts(config.dedup)
    if not problems:
        return
    rewards = config.rewards
    if config.filters.min_language and not rewards.language_weight:
        rewards = dataclasses.replace(rewards, language_weight=1.0)  # parts are read here, never the total
    size = max(1, ROUND_SAMPLES // config.samples)
    print(f"{config.model}: {len(problems)} problems x {config.samples} samples", flush=True)
    with (
        scorer_for(rewards, problems) as scorer,
        running_engines(config.rollout, folder=inputs.folder, run_dir=config.run_dir, seed=config.seed) as engines,
    ):
        scorer.check_started()
        progress = SamplingProgress(len(problems))
        for start in range(0, len(problems), size):
            some = problems[start : start + size]
            graded = sample_and_grade(
                engines,
                some,
                num_samples=config.samples,
                template=config.data.template,
                rollout=config.rollout,
                tokenizer=inputs.tokenizer,
                scorer=scorer,
                progress=progress,
                seed=config.seed + start * config.samples,
            )
            samples = _samples(some, graded)
            reasons = [first_reason(sample, config) for sample in samples]
            judgements = _judged(inputs.judge, samples, reasons)
            decisions = select(
                samples, reasons, config=config, seen=seen, index=inputs.index, judgements=judgements
            )  # fmt: skip
            yield graded.seconds, decisions


def _samples(problems: Sequence[Problem], graded: Graded) -> list[Sample]:
    return [
        Sample(
            problem=problem,
            number=number,
            text=completion.text,
            finish_reason=completion.finish_reason,
            num_tokens=len(completion.token_ids),
            parts=reward.parts,
        )
        for problem, group, rewards in zip(problems, graded.groups, graded.rewards, strict=True)
        for number, (completion, reward) in enumerate(zip(group, rewards, strict=True))
    ]


def _judged(
    judge: Judge | None, samples: Sequence[Sample], reasons: Sequence[str | None]
) -> dict[tuple[str, int], Judgement]:
    """Judgements of the samples that only a judge can still find right, by sample key."""
    open_ones = [
        sample for sample, reason in zip(samples, reasons) if reason is None and sample.parts["accuracy"] != 1.0
    ]
    if judge is None or not open_ones:
        return {}
    questions = [
        ("\n".join(spoken_turns(one.problem.messages)), str(one.problem.answer), one.text) for one in open_ones
    ]
    return {one.key: found for one, found in zip(open_ones, judge.match_reference(questions), strict=True)}


def _provenance(config: RejectionConfig, folder: Path) -> dict[str, Any]:
    """What made every kept sample: the model's files, the configuration, how it was sampled."""
    text = json.dumps(plain_json(dataclasses.asdict(config)), sort_keys=True)
    weights = blake3(max_threads=blake3.AUTO)
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        weights.update_mmap(file)
    sampling = config.rollout.sampling
    return {
        "model": str(config.model),
        "model_blake3": weights.hexdigest(),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": config.seed,
    }


def _sample_record(decision: Decision) -> dict[str, Any]:
    sample = decision.sample
    return {
        "problem": sample.problem.id, "sample": sample.number, "text": sample.text, "parts": sample.parts,
        "tokens": sample.num_tokens, "finish_reason": sample.finish_reason, "reason": decision.reason,
    }  # fmt: skip


def _kept_record(decision: Decision, provenance: dict[str, Any]) -> dict[str, Any]:
    sample = decision.sample
    made = {"problem": sample.problem.id, "sample": sample.number, "correct_by": decision.correct_by}
    return {
        "id": f"{sample.problem.id}#{sample.number}",
        "messages": [*sample.problem.messages, {"role": "assistant", "content": sample.text.strip()}],
        "domain": sample.problem.domain,
        "source": "rejection",
        "provenance": {**provenance, **made, "parts": sample.parts},
    }
