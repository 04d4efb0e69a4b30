"""pass@k, cons@k and intervals against hand-computed values and against counting."""

import itertools
import math

import numpy as np
import pytest

from megatron_r1.stages.evaluate.scores import answer_classes, bootstrap_interval, consensus, mean_parts, pass_at_k
from megatron_r1.types import Reward


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 2, 1, 0.5), (4, 2, 2, 5 / 6), (4, 2, 3, 1.0), (4, 0, 4, 0.0), (4, 4, 1, 1.0), (5, 1, 2, 0.4), (1, 1, 1, 1.0)],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    right = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        draws = [any(draw) for draw in itertools.combinations(right, k)]
        assert pass_at_k(7, 2, k) == pytest.approx(np.mean(draws), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 1), (0, 0, 1)])
def test_pass_at_k_that_is_not_defined(n, c, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("classes", "correct", "expected"),
    [
        ([0, 0, 1], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1], [True, False], 0.5),  # a tie: a fair draw is right half of the time
        ([0, 0, 1, 1, 2, 2, 3], [True, True, False, False, False, False, False], 1 / 3),
        ([None, None, None, 0], [False, False, False, True], 1.0),  # no answer, no vote
        ([None, None], [False, False], 0.0),
        ([], [], 0.0),
    ],
)
def test_consensus(classes, correct, expected):
    assert consensus(classes, correct) == pytest.approx(expected)


def test_classes_hold_equivalent_answers_and_ask_about_each_pair_of_spellings_once():
    asked = []

    def equal(pairs):
        asked.extend(pairs)
        return [float(a) == float(b) for a, b in pairs]

    answers = ["1", "2.0", None, "1.0", "2", "1", "", "3"]
    assert answer_classes(answers, equal) == [0, 1, None, 0, 1, 0, None, 2]
    assert len(asked) == len(set(asked)) and ("1", "1") not in asked


def test_the_interval_covers_the_mean_and_shrinks_with_more_problems():
    rng = np.random.default_rng(0)
    few, many = (rng.random(size) < 0.7 for size in (20, 2000))
    for values in (few, many):
        low, high = bootstrap_interval(values.astype(float))
        assert low < values.mean() < high
    widths = [np.diff(bootstrap_interval(values.astype(float)))[0] for values in (few, many)]
    assert widths[0] > 5 * widths[1]
    # the normal approximation of a share: 2 * 1.96 * sqrt(p (1 - p) / n)
    assert widths[1] == pytest.approx(3.92 * np.sqrt(many.mean() * (1 - many.mean()) / 2000), rel=0.1)
    assert bootstrap_interval([1.0] * 5) == [1.0, 1.0]
    assert bootstrap_interval([0.0, 1.0, 1.0], seed=3) == bootstrap_interval([0.0, 1.0, 1.0], seed=3)


def test_the_mean_of_a_part_is_over_those_that_have_it():
    rewards = [Reward(total=1.0, parts={"accuracy": 1.0, "format": 1.0}), Reward(total=0.5, parts={"format": 0.5})]
    assert mean_parts(rewards) == {"accuracy": 1.0, "format": 0.75}


def test_the_mean_of_a_part_is_over_finite_numbers():
    rewards = [Reward(total=1.0, parts={"helpful": value, "harmless": math.inf}) for value in (math.nan, 1.0, 2.0)]
    found = mean_parts(rewards)
    assert found["helpful"] == 1.5 and math.isnan(found["harmless"])
