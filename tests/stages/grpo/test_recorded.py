"""Rollouts that are written and read again for training, without a server."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.algorithms import GRPO
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.errors import PreemptedError
from megatron_r1.observe.watch import Watch
from megatron_r1.recipes import RECIPES
from megatron_r1.rollout.recording import Recording
from megatron_r1.stages.grpo.collector import Rollout
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.graders import Graders
from megatron_r1.stages.grpo.recorded import _sample_steps, record, recorded
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


class Border:
    """Problems, of which every second one has no answer to compare with, and what is sampled for them."""

    def __init__(self) -> None:
        self.drawn = 0

    def take(self, count: int, wanted: Callable[[Problem], bool] = lambda problem: True) -> list[Problem]:
        found: list[Problem] = []
        while len(found) < count:
            grader = "preference" if self.drawn % 2 else "math"
            problem = dataclasses.replace(PROBLEM, id=str(self.drawn), grader=grader)
            self.drawn += 1
            found += [problem] if wanted(problem) else []
        return found

    def together(self, work):
        return work()

    def collect(self, problems: list[Problem], **_: int) -> Rollout:
        groups = [group(problem, 7, 5) for problem in problems]
        return Rollout(groups=groups, reward_seconds=0.0, num_tokens=4, restarts=0, grading={})


def sample(config: GRPOConfig) -> Recording:
    """As a run with rollout_only does between its start and its end."""
    recording, border = Recording(config.run_dir), Border()
    tokenizer = load_tokenizer(config.model.path)
    watch = Watch(config.run_dir, rank=0, deadlines={})
    _sample_steps(config, recording, border, border, Graders(), tokenizer, watch)  # pyright: ignore[reportArgumentType]
    return recording


@pytest.fixture
def config(tmp_path) -> GRPOConfig:
    (tmp_path / "recorded").mkdir()
    tiny = RECIPES["tiny"]()
    assert isinstance(tiny, GRPOConfig)
    return dataclasses.replace(tiny, run_dir=tmp_path, steps=2, prompts_per_step=2, group_size=2, algorithm=GRPO())


def test_problems_for_reward_models_wait_for_their_step(config):
    recording = sample(dataclasses.replace(config, preference_from_step=1))
    graders = [[group.problem.grader for group in recording.read(step).groups] for step in (0, 1)]
    assert graders == [["math", "math"], ["preference", "math"]]


def test_a_run_that_ends_within_a_step_has_every_step_once_when_it_goes_on(config):
    class Killed(GRPO):
        """Ends the run when the second step's samples are there and its lines are not."""

        def rewards(self, group: RolloutGroup, max_new_tokens: int) -> np.ndarray:
            if group.problem.id == "2":
                raise KeyboardInterrupt
            return super().rewards(group, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):
        sample(dataclasses.replace(config, algorithm=Killed()))
    recording = sample(config)
    assert recording.num_steps() == 2
    assert steps_in(config.run_dir / "metrics.jsonl") == [0, 1]
    assert steps_in(config.run_dir / "rollouts.jsonl") == [0] * 4 + [1] * 4


def test_a_run_that_is_asked_to_end_keeps_its_steps_and_goes_on(config):
    (config.run_dir / "stop").touch()
    with pytest.raises(PreemptedError, match=r"asked to end: stopped after step 1; start it again to go on"):
        sample(config)
    assert Recording(config.run_dir).num_steps() == 1 and not (config.run_dir / "stop").exists()
    assert sample(config).num_steps() == 2
    (config.run_dir / "stop").touch()
    assert sample(config).num_steps() == 2, "it was at its end"


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]
