"""A step's groups: sampled in one round, or in several until enough of them can teach anything (dynamic sampling)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_r1.algorithms.base import Algorithm
from megatron_r1.rewards.table import grader_of
from megatron_r1.types import Problem, RolloutGroup

LEAST_SHARE = 1 / 8
"""A further round draws as many problems as would do if this share of them, at least, could teach anything."""


class Rollout(Protocol):
    """What one collection gives (stages/grpo/collector.py)."""

    @property
    def groups(self) -> list[RolloutGroup]: ...
    @property
    def reward_seconds(self) -> float: ...
    @property
    def grading(self) -> dict[str, int]: ...


class Collect(Protocol):
    """Samples and grades a group for each problem. `first`: the step's problems that came before."""

    def __call__(
        self, problems: Sequence[Problem], *, group_size: int, seed: int, step: int, first: int
    ) -> Rollout: ...


@dataclass(slots=True, kw_only=True)
class Sampled:
    """What a step sampled: `kept` is trained on, `groups` are all of them."""

    groups: list[RolloutGroup] = field(default_factory=list)
    kept: list[RolloutGroup] = field(default_factory=list)
    rounds: int = 0
    reward_seconds: float = 0.0
    grading: dict[str, int] = field(default_factory=dict)

    def older_than(self, version: int) -> bool:
        """Whether weights before `version` sampled any of what is trained on."""
        return any(completion.weight_version < version for group in self.kept for completion in group.completions)


def wanted_at(step: int, preference_from_step: int) -> Callable[[Problem], bool]:
    """Which problems a step may draw: those that only reward models judge from `preference_from_step` on."""
    early = step < preference_from_step
    return lambda problem: not early or grader_of(problem).has_accuracy


def sample_step(
    take: Callable[[int], list[Problem]],
    collect: Collect,
    algorithm: Algorithm,
    *,
    prompts: int,
    group_size: int,
    seed: int,
    step: int,
) -> Sampled:
    """`prompts` groups that the algorithm keeps, or fewer after algorithm.sampling_rounds rounds. With one round every
    group is kept."""
    found = Sampled()
    while found.rounds < algorithm.sampling_rounds and len(found.kept) < prompts:
        problems = take(_wanted(found, prompts))
        rollout = collect(
            problems,
            group_size=group_size,
            seed=step_seed(seed, step, found.rounds),
            step=step,
            first=len(found.groups),
        )
        found.groups += rollout.groups
        found.kept += [
            group for group in rollout.groups if algorithm.sampling_rounds == 1 or algorithm.worth_training(group)
        ]
        found.rounds += 1
        found.reward_seconds += rollout.reward_seconds
        for name, count in rollout.grading.items():
            found.grading[name] = found.grading.get(name, 0) + count
    del found.kept[prompts:]
    return found


def _wanted(found: Sampled, prompts: int) -> int:
    """Problems of the next round: those that are missing, by the share that was kept so far."""
    if not found.rounds:
        return prompts
    share = max(len(found.kept) / len(found.groups), LEAST_SHARE)
    return min(prompts, math.ceil((prompts - len(found.kept)) / share))


def step_seed(seed: int, step: int, round: int = 0) -> int:
    """The random seed of a round of a step's rollout, u62. Completion g of prompt i samples with this + i * group_size
    + g, so seeds of neighbouring steps and runs must lie far apart."""
    words = [seed, step, round] if round else [seed, step]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 2)
