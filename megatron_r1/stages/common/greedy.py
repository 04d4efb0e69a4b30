"""Greedy answers to held-out problems with the engines' current weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_r1.stages.evaluate.scores import mean_parts
from megatron_r1.stages.grpo.collector import Collector
from megatron_r1.types import Problem


def greedy_scores(collector: Collector, problems: Sequence[Problem]) -> dict[str, float]:
    """Means over one greedy completion of each problem: every part of the reward (accuracy, format, ...) by its name,
    and `length` in tokens. A collective."""

    def work() -> dict[str, float]:
        rollout = collector.collect(problems, group_size=1, seed=0, greedy=True)
        lengths = [len(group.completions[0].token_ids) for group in rollout.groups]
        return mean_parts([group.rewards[0] for group in rollout.groups]) | {"length": float(np.mean(lengths))}

    return collector.together(work)
