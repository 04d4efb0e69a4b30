"""Rollouts that are written and read again for training, without a server."""

import dataclasses

import numpy as np

from megatron_r1.rollout.recording import Recording
from megatron_r1.stages.grpo.recorded import record, recorded
from megatron_r1.stages.grpo.sampling import Sampled
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup

PROBLEM = Problem(id="p", domain="math", messages=({"role": "user", "content": "1 + 1"},), answer="2")


def group(problem: Problem, *tokens: int) -> RolloutGroup:
    """One completion of one token for each of `tokens`."""
    return RolloutGroup(
        problem=problem,
        prompt_ids=np.array([1, 2], np.int32),
        completions=tuple(
            Completion(
                token_ids=np.array([token], np.int32),
                logprobs=np.array([-0.5], np.float32),
                finish_reason="stop",
                weight_version=0,
            )
            for token in tokens
        ),
        rewards=tuple(Reward(total=float(token == 7), parts={}) for token in tokens),
    )


def tokens(groups: list[RolloutGroup]) -> list[list[int]]:
    return [[int(completion.token_ids[0]) for completion in group.completions] for group in groups]


def taught(group: RolloutGroup) -> RolloutGroup:
    """As stages/grpo/teacher.py returns it: another object with the same tokens."""
    scored = [dataclasses.replace(one, teacher_logprobs=one.logprobs - 1) for one in group.completions]
    return dataclasses.replace(group, completions=tuple(scored))


def test_a_problem_that_a_step_drew_twice_keeps_both_groups(tmp_path):
    """The stream begins its next epoch within a step; dynamic sampling has left the first of the two out."""
    (tmp_path / "recorded").mkdir()
    groups = [group(PROBLEM, 3, 3), group(dataclasses.replace(PROBLEM, id="q"), 7, 4), group(PROBLEM, 7, 5)]
    recording = Recording(tmp_path)
    record(recording, 0, Sampled(groups=groups, kept=[taught(each) for each in groups[1:]], rounds=2))
    found = recorded(recording, 0)
    assert tokens(found.groups) == [[3, 3], [7, 4], [7, 5]]
    assert tokens(found.kept) == [[7, 4], [7, 5]]
    assert [one.teacher_logprobs for one in found.groups[0].completions] == [None, None]
    assert [one.teacher_logprobs for each in found.kept for one in each.completions] == [-1.5] * 4
    record(recording, 1, Sampled(groups=groups, kept=groups, rounds=1))
    assert tokens(recorded(recording, 1).kept) == [[3, 3], [7, 4], [7, 5]]
