"""One step's row of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_r1.algorithms.base import Algorithm
from megatron_r1.stages.evaluate.scores import mean_parts
from megatron_r1.stages.grpo.sampling import Sampled
from megatron_r1.stages.grpo.usable import left_out, usable_places, without_signal
from megatron_r1.types import StepResult

ASIDE = ("evaluate", "save")
"""Phases that are no part of a step: tokens per second are counted without them."""


def step_metrics(
    results: Sequence[StepResult],
    sampled: Sampled,
    advantages: Sequence[np.ndarray],
    algorithm: Algorithm,
    mismatch: Mapping[str, Any],
    *,
    step: int,
) -> dict[str, Any]:
    """All but the timing. `advantages`: f64[G] of each group that was kept; `step` counts from 0.

    Token metrics of several minibatches are averaged; `mismatch` (Gate.metrics) is of the rollout before the first of
    them."""
    trained = [result for result in results if result.metrics]
    completions_left_out, groups_left_out = left_out(advantages)
    several = algorithm.sampling_rounds > 1
    return {
        "loss": _mean([result.loss for result in trained]),
        **{
            name: _mean([result.metrics[name] for result in trained if name in result.metrics])
            for name in (*algorithm.METRICS, "entropy")
        },
        **mismatch,
        "grad_norm": _mean([result.grad_norm for result in trained]),
        "lr": results[-1].learning_rate,
        "skipped_steps": sum(result.skipped for result in results),
        "completions_left_out": completions_left_out,
        "groups_left_out": groups_left_out,
        **({"groups_sampled": len(sampled.groups), "sampling_rounds": sampled.rounds} if several else {}),
        **sample_metrics(sampled),
        "staleness": float(
            np.mean([step - one.weight_version for group in sampled.groups for one in group.completions])
        ),
    }


def sample_metrics(sampled: Sampled) -> dict[str, Any]:
    """What is known before anything is trained.

    Means of rewards, lengths and the like are over all groups that were sampled, and over rewards that are usable (of a
    part: where it is a finite number; `broken_parts` counts the others)."""
    groups = sampled.groups
    usable = [usable_places(group) for group in groups]
    rewards = [
        reward
        for group, places in zip(groups, usable, strict=True)
        for reward, place in zip(group.rewards, places, strict=True)
        if place
    ]
    completions = [completion for group in groups for completion in group.completions]
    return {
        "reward_mean": _mean([reward.total for reward in rewards]),
        **mean_parts(rewards),
        "length_mean": float(np.mean([len(completion.token_ids) for completion in completions])),
        "truncated": float(np.mean([completion.finish_reason == "length" for completion in completions])),
        "zero_advantage_groups": sum(map(without_signal, groups)),
        "broken_parts": sum(not math.isfinite(part) for g in groups for r in g.rewards for part in r.parts.values()),
        "weight_version": max(completion.weight_version for completion in completions),
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
        "tokens": sum(len(g.prompt_ids) + len(c.token_ids) for g in groups for c in g.completions),
    }


def _mean(values: Sequence[float]) -> float:
    """NaN of nothing: metrics.jsonl then has null."""
    return float(np.mean(values)) if values else math.nan


def timing(seconds: dict[str, float], reward_seconds: float, tokens: int) -> dict[str, Any]:
    """Seconds by phase and the tokens of a working second. Grading that outlasted generation ran inside the rollout."""
    seconds["reward"] = reward_seconds
    seconds["rollout"] -= reward_seconds
    working = sum(value for phase, value in seconds.items() if phase not in ASIDE)
    return {"seconds": seconds, "tokens_per_second": tokens / max(working, 1e-9)}
