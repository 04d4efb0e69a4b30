"""Which completions of a rollout are trained on: those whose reward is a number that advantages can be computed from.

One broken reward would otherwise make its whole group's advantages NaN, and the step's gradient with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_r1.config.schema import GRPOConfig
from megatron_r1.grpo.advantage import group_advantages, usable_rewards
from megatron_r1.types import Completion, RolloutGroup

NAMED = 4
"""Problems that are named in the log."""


def advantages_of(group: RolloutGroup, config: GRPOConfig) -> np.ndarray:
    """f64[G]: see group_advantages; NaN for completions that are left out."""
    rewards_G = np.array([reward.total for reward in group.rewards])
    return group_advantages(rewards_G, config.advantage, config.deviation_floor)


def kept_completions(group: RolloutGroup, config: GRPOConfig) -> list[tuple[Completion, float]]:
    """The completions that are trained on, with their advantages. Those that a teacher has scored all are: their loss
    knows no rewards."""
    return [
        (completion, 0.0 if math.isnan(advantage) else float(advantage))
        for completion, advantage in zip(group.completions, advantages_of(group, config), strict=True)
        if not math.isnan(advantage) or completion.teacher_logprobs is not None
    ]


def left_out(groups: Sequence[RolloutGroup], config: GRPOConfig) -> tuple[int, int]:
    """How many completions are left out, and how many groups are left out whole."""
    kept = [len(kept_completions(group, config)) for group in groups]
    completions = sum(len(group.completions) for group in groups) - sum(kept)
    return completions, kept.count(0)


def left_out_note(groups: Sequence[RolloutGroup], config: GRPOConfig) -> str | None:
    """What to say of the completions that are left out: how many, and which parts of which problems' rewards are to
    blame. None if there are none."""
    completions, whole = left_out(groups, config)
    if not completions:
        return None
    blamed = [f"{group.problem.id} ({_blame(group)})" for group in groups if _blame(group)]
    more = f" and {len(blamed) - NAMED} more" if len(blamed) > NAMED else ""
    return (
        f"{completions} completion(s) left out, {whole} group(s) of them whole, because a reward is not a finite "
        f"number: {', '.join(blamed[:NAMED])}{more}"
    )


def usable_places(group: RolloutGroup) -> np.ndarray:
    """bool[G]: the completions whose own reward is usable, whatever becomes of the group."""
    return np.array([bool(usable_rewards(np.array([reward.total])).all()) for reward in group.rewards])


def _blame(group: RolloutGroup) -> str:
    """`helpful nan, total inf` of a group's first reward that is not usable; empty if all are."""
    for reward, usable in zip(group.rewards, usable_places(group), strict=True):
        if not usable:
            parts = [f"{name} {value}" for name, value in reward.parts.items() if not math.isfinite(value)]
            return ", ".join(parts or [f"total {reward.total}"])
    return ""
