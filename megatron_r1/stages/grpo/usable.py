"""Which completions of a rollout are trained on: those whose reward is a number that advantages can be computed from.

One broken reward would otherwise make its whole group's advantages NaN, and the step's gradient with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_r1.algorithms.base import Algorithm
from megatron_r1.algorithms.checks import array_fault
from megatron_r1.algorithms.group_advantage import group_advantages, usable_rewards
from megatron_r1.errors import AlgorithmError
from megatron_r1.types import RolloutGroup

NAMED = 4
"""Problems that are named in the log."""


def advantages_of(algorithm: Algorithm, rewards_G: np.ndarray) -> np.ndarray:
    """The algorithm's advantages f64[G] of the usable rewards, as if there were no others; NaN for a completion that is
    left out. With a teacher all are trained on, whatever their rewards. AlgorithmError if they are not finite."""
    if algorithm.needs.teacher is not None:
        return np.zeros(len(rewards_G))
    usable_G = usable_rewards(rewards_G)
    advantages_G = np.full(len(rewards_G), np.nan)
    if usable_G.any():
        kept = np.asarray(rewards_G, dtype=np.float64)[usable_G]
        found = algorithm.advantages(kept)
        if fault := array_fault(f"{type(algorithm).__name__}.advantages", found, len(kept)):
            raise AlgorithmError(f"{fault}, for rewards {kept.tolist()}")
        advantages_G[usable_G] = found
    return advantages_G


def left_out(advantages: Sequence[np.ndarray]) -> tuple[int, int]:
    """How many completions are left out, and how many groups are left out whole; f64[G] of each group, NaN where a
    completion is left out."""
    missing = [np.isnan(advantages_G) for advantages_G in advantages]
    return sum(int(missing_G.sum()) for missing_G in missing), sum(bool(missing_G.all()) for missing_G in missing)


def without_signal(group: RolloutGroup) -> bool:
    """Whether its usable rewards are all equal, so that there is nothing to tell apart. A group that is left out whole,
    for lack of two usable rewards, is not among them."""
    centred_G = group_advantages(np.array([reward.total for reward in group.rewards]))
    known = centred_G[~np.isnan(centred_G)]
    return known.size > 0 and not known.any()


def left_out_note(groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray]) -> str | None:
    """What to say of the completions that are left out: how many, and which parts of which problems' rewards are to
    blame. None if there are none."""
    completions, whole = left_out(advantages)
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
