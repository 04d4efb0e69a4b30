"""Which problems per step samples, in how many rounds, and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from megatron_r1.algorithms import DAPO, GRPO
from megatron_r1.stages.grpo.sampling import sample_step, step_seed
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup


def group(problem: Problem, differ: bool) -> RolloutGroup:
    completion = Completion(
        token_ids=np.zeros(2, np.int32), logprobs=np.zeros(2, np.float32), finish_reason="stop", weight_version=0
    )
    return RolloutGroup(
        problem=problem,
        prompt_ids=np.zeros(1, np.int32),
        completions=(completion, completion),
        rewards=(Reward(total=1.0, parts={}), Reward(total=0.0 if differ else 1.0, parts={})),
    )


@dataclass
class Rollout:
    groups: list[RolloutGroup]
    reward_seconds: float = 0.5
    grading: dict[str, int] = field(default_factory=lambda: {"grading_errors": 1})


class World:
    """Problem n's rewards differ if n is in `differ`."""

    def __init__(self, differ: set[int]) -> None:
        self.differ, self.drawn, self.calls = differ, 0, []

    def take(self, count: int) -> list[Problem]:
        names = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [Problem(id=str(n), domain="math", messages=()) for n in names]

    def collect(self, problems, *, group_size, seed, step, first) -> Rollout:
        self.calls.append((len(problems), seed, first))
        return Rollout([group(problem, int(problem.id) in self.differ) for problem in problems])

    def sample(self, algorithm, prompts: int = 4):
        return sample_step(self.take, self.collect, algorithm, prompts=prompts, group_size=2, seed=3, step=7)


def test_one_round_keeps_every_group():
    world = World(set())
    found = world.sample(GRPO())
    assert world.calls == [(4, step_seed(3, 7), 0)]
    assert len(found.kept) == len(found.groups) == 4 and found.rounds == 1


def test_groups_that_teach_nothing_are_replaced():
    # Round 1: problems 0 to 3, of which 1 and 2 differ. Two are missing at a share of 1/2: round 2 draws 4.
    world = World({1, 2, 5, 6, 7})
    found = world.sample(DAPO())
    assert [int(one.problem.id) for one in found.kept] == [1, 2, 5, 6], "7 is one too many"
    assert world.calls == [(4, step_seed(3, 7), 0), (4, step_seed(3, 7, 1), 4)]
    assert (len(found.groups), found.rounds, found.reward_seconds) == (8, 2, 1.0)
    assert found.grading == {"grading_errors": 2}


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_after_the_last_round_it_trains_on_what_it_has(rounds):
    world = World({0} if rounds > 1 else set())
    found = world.sample(DAPO(sampling_rounds=rounds))
    assert found.rounds == rounds
    assert len(found.kept) == (4 if rounds == 1 else 1), "with one round nothing is judged"


def test_a_round_draws_no_more_than_a_step():
    world = World(set())
    world.sample(DAPO(sampling_rounds=3), prompts=8)
    assert [count for count, _, _ in world.calls] == [8, 8, 8]
    world = World({0, 1, 2, 3, 4, 5, 6})
    world.sample(DAPO(sampling_rounds=2), prompts=8)
    assert [count for count, _, _ in world.calls] == [8, 2], "one is missing at a share of 7/8"
