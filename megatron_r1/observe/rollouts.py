"""Which completions of a step people can read later, and what is said about each.

Left out: writing (metrics.JsonLines) and showing (report.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_r1.types import RolloutGroup


def rollout_records(
    *,
    step: int,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]],
    prompt_texts: Sequence[str],
    limit: int,
) -> Iterator[dict[str, Any]]:
    """At most `limit` plain-JSON records of a step: the first completion of every group, then the second, ...

    advantages: one number per completion of each group; prompt_texts: the prompt as the model saw it, one per
    group.
    """
    if not len(groups) == len(advantages) == len(prompt_texts):
        raise ValueError(
            f"{len(groups)} groups, {len(advantages)} lists of advantages, {len(prompt_texts)} prompts; "
            "expected one of each per group"
        )
    largest = max((len(group.completions) for group in groups), default=0)
    places = [(k, g) for k in range(largest) for g, group in enumerate(groups) if k < len(group.completions)]
    for k, g in places[: max(limit, 0)]:
        group = groups[g]
        completion, reward = group.completions[k], group.rewards[k]
        yield {
            "step": step,
            "problem_id": group.problem.id,
            "prompt": prompt_texts[g],
            "completion": completion.text,
            "answer": group.problem.answer,
            "reward": float(reward.total),
            "parts": {name: float(value) for name, value in reward.parts.items()},
            "advantage": float(advantages[g][k]),
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "weight_version": completion.weight_version,
        }
