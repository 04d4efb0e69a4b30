"""The grader "preference": problems without a right answer, which only reward models score (docs/reward_models.md)."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from megatron_r1.config.schema import PreferenceConfig, RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.grader import Grader
from megatron_r1.types import Problem


class Preference(Protocol):
    """A reward model, wherever it runs."""

    @property
    def config(self) -> PreferenceConfig: ...
    def submit(self, problem: Problem, response: str) -> Future[float]: ...


def check(problem: Problem, config: RewardConfig) -> None:
    """DataError for a problem whose domain no reward model scores: said before the run, which may draw it only after a
    thousand steps (preference_from_step)."""
    scored = {domain for preference in config.preferences for domain in preference.domains}
    if problem.domain not in scored:
        known = ", ".join(sorted(scored)) or "none"
        raise DataError(
            f"problem {problem.id}: no reward model scores domain {problem.domain!r} (those of "
            f"rewards.preferences: {known}); add the domain to a reward model, or leave the problem out"
        )


GRADER = Grader(name="preference", check=check, has_accuracy=False)
