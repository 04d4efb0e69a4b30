"""Greedy held-out accuracy with the engines' current weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_r1.stages.collector import Collector
from megatron_r1.types import Problem


def greedy_accuracy(collector: Collector, problems: Sequence[Problem]) -> float:
    """Share of problems whose one greedy completion has a right answer. A collective."""
    rollout = collector.collect(problems, group_size=1, seed=0, greedy=True)
    return float(np.mean([group.rewards[0].parts["accuracy"] for group in rollout.groups]))
