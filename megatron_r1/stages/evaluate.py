"""Greedy answers to held-out problems with the engines' current weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_r1.stages.collector import Collector
from megatron_r1.types import Problem


def greedy_scores(collector: Collector, problems: Sequence[Problem]) -> dict[str, float]:
    """Means over one greedy completion of each problem: every part of the reward (accuracy, format, ...) by its name,
    and `length` in tokens. A collective."""
    rollout = collector.collect(problems, group_size=1, seed=0, greedy=True)
    rewards = [group.rewards[0] for group in rollout.groups]
    names = dict.fromkeys(name for reward in rewards for name in reward.parts)
    lengths = [len(group.completions[0].token_ids) for group in rollout.groups]
    means = {name: float(np.mean([r.parts[name] for r in rewards if name in r.parts])) for name in names}
    return means | {"length": float(np.mean(lengths))}
