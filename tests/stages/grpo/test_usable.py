"""Completions without a usable reward: left out of their group, counted and named."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from megatron_r1.algorithms import ALGORITHMS, GRPO, Algorithm
from megatron_r1.data.packing import RowLayout, pack
from megatron_r1.errors import DivergedError
from megatron_r1.stages.common.divergence import SkippedSteps
from megatron_r1.stages.grpo import usable
from megatron_r1.stages.grpo.metrics import step_metrics
from megatron_r1.stages.grpo.mismatch import Mismatch
from megatron_r1.stages.grpo.sampling import Sampled
from megatron_r1.stages.grpo.sequences import to_sequences
from megatron_r1.stages.grpo.usable import left_out, left_out_note
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup, StepResult

NAN = math.nan


PAPERS = GRPO()


def advantages_of(groups: list[RolloutGroup], algorithm: Algorithm = PAPERS) -> list[np.ndarray]:
    return [usable.advantages_of(algorithm, algorithm.rewards(group, 8)) for group in groups]


def metrics_of(results: list[StepResult], groups: list[RolloutGroup]):
    return step_metrics(
        results, Sampled(groups=groups, kept=groups), advantages_of(groups), PAPERS, Mismatch().metrics(), step=0
    )


def sequences_of(groups: list[RolloutGroup], algorithm: Algorithm = PAPERS):
    return to_sequences(list(zip(groups, advantages_of(groups, algorithm), strict=True)), algorithm, 8)


def group(name: str, rewards: list[float]) -> RolloutGroup:
    """Completion i has i + 2 tokens."""
    completions = tuple(
        Completion(
            token_ids=np.arange(i + 2, dtype=np.int32) + 5,
            logprobs=np.full(i + 2, -0.5, np.float32),
            finish_reason="stop",
            weight_version=0,
        )
        for i in range(len(rewards))
    )
    given = tuple(Reward(total=total, parts={"accuracy": 1.0, "helpful": total}) for total in rewards)
    problem = Problem(id=name, domain="math", messages=())
    return RolloutGroup(problem=problem, prompt_ids=np.array([1, 2], np.int32), completions=completions, rewards=given)


def without(whole: RolloutGroup, *places: int) -> RolloutGroup:
    kept = [i for i in range(len(whole.completions)) if i not in places]
    pick = lambda items: tuple(items[i] for i in kept)  # noqa: E731
    return dataclasses.replace(whole, completions=pick(whole.completions), rewards=pick(whole.rewards))


@pytest.mark.parametrize("algorithm", [kind() for name, kind in ALGORITHMS.items() if name != "on_policy_distill"])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, 1e30])
@pytest.mark.filterwarnings("error")
def test_the_step_is_that_of_the_groups_without_them(algorithm, bad):
    """Every rank's rows too, array by array: a rank has nothing else to divide the work by."""
    first, second = group("a", [1.0, bad, 0.0, 0.0]), group("b", [2.0, 1.0])
    layout = RowLayout(tokens_per_microbatch=16)
    found, expected = (
        pack(sequences_of(groups, algorithm), layout, num_ranks=2)
        for groups in ([first, second], [without(first, 1), second])
    )
    for rank in range(2):
        assert len(found[rank]) == len(expected[rank])
        for row, other in zip(found[rank], expected[rank], strict=True):
            for field in dataclasses.fields(row):
                np.testing.assert_array_equal(getattr(row, field.name), getattr(other, field.name))
            assert np.isfinite(row.advantages).all()
    assert left_out(advantages_of([first, second], algorithm)) == (1, 0)


def test_a_group_of_which_fewer_than_two_remain_is_left_out_whole():
    first, second = group("a", [1.0, NAN]), group("b", [2.0, 1.0])
    found, expected = (sequences_of(groups) for groups in ([first, second], [second]))
    assert [sequence.advantage for sequence in found] == [sequence.advantage for sequence in expected] == [1.0, -1.0]
    assert left_out(advantages_of([first, second])) == (2, 1)
    assert sequences_of([first]) == []


def test_the_log_names_the_problem_and_the_part():
    groups = [group("gsm8k/7", [1.0, NAN, 0.0]), group("b", [1.0, 0.0]), group("c", [math.inf, 0.0])]
    assert left_out_note(groups, advantages_of(groups)) == (
        "3 completion(s) left out, 1 group(s) of them whole, because a reward is not a finite number: "
        "gsm8k/7 (helpful nan), c (helpful inf)"
    )
    assert left_out_note(groups[1:2], advantages_of(groups[1:2])) is None


def test_metrics_count_them_and_average_the_others():
    groups = [
        group("a", [1.0, NAN, 0.0]), group("b", [1.0, 1.0]), group("c", [NAN, 0.5]), group("d", [NAN, NAN]),
        group("e", [0.3, NAN, 0.3]),
    ]  # fmt: skip
    token_metrics = {"kl": 0.1, "entropy": 0.2, "clip_fraction": 0.0}
    taken = StepResult(loss=1.0, grad_norm=2.0, learning_rate=1e-3, metrics=token_metrics)
    skipped = StepResult(loss=0.0, grad_norm=0.0, learning_rate=2e-3, metrics={}, skipped=True)
    metrics = metrics_of([taken, skipped], groups)
    assert (metrics["completions_left_out"], metrics["groups_left_out"]) == (1 + 2 + 2 + 1, 2)
    assert metrics["reward_mean"] == metrics["helpful"] == pytest.approx((1.0 + 2.0 + 0.5 + 0.6) / 7)
    assert metrics["zero_advantage_groups"] == 2, "b and e; c and d are left out whole, which is another count"
    assert metrics["broken_parts"] == 5
    assert (metrics["loss"], metrics["grad_norm"], metrics["kl"], metrics["skipped_steps"]) == (1.0, 2.0, 0.1, 1)
    assert metrics["completion_tokens"] == (2 + 3 + 4) * 2 + (2 + 3) * 3, "all that was sampled"


def test_a_broken_part_without_a_weight_breaks_nothing():
    """A reward model that is only recorded (weight 0) gives NaN: the total knows nothing of it, nor do the means."""
    scored = group("a", [1.0, 0.0, 0.5])
    parts = [{"accuracy": 1.0, "helpful": NAN}, {"accuracy": 0.0, "helpful": -2.0}, {"accuracy": 0.5, "helpful": 4.0}]
    rewards = tuple(Reward(total=p["accuracy"], parts=p) for p in parts)
    taken = StepResult(loss=1.0, grad_norm=2.0, learning_rate=1e-3, metrics={"entropy": 0.0})
    metrics = metrics_of([taken], [dataclasses.replace(scored, rewards=rewards)])
    assert (metrics["reward_mean"], metrics["accuracy"], metrics["helpful"]) == (0.5, 0.5, 1.0)
    assert (metrics["broken_parts"], metrics["completions_left_out"], metrics["zero_advantage_groups"]) == (1, 0, 0)


def test_a_run_whose_rewards_are_all_broken_stops_and_says_why():
    skips = SkippedSteps(1)
    nothing = StepResult(loss=0.0, grad_norm=0.0, learning_rate=1e-3, metrics={}, skipped=True)
    skips.check(nothing, 0)
    with pytest.raises(DivergedError, match=r"step 2: 2 optimizer steps in a row had nothing .* metrics.jsonl"):
        skips.check(nothing, 1)
