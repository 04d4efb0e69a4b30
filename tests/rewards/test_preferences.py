"""Reward models as parts of the reward: which problems they score, with which weight, and what happens where there is
none. The models here are functions; real ones are in engines/vllm/test_preference.py."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_r1.config.schema import PreferenceConfig, RewardConfig
from megatron_r1.errors import DataError, EngineError
from megatron_r1.rewards import preference
from megatron_r1.rewards.compose import Scorer
from megatron_r1.types import Problem


class Model:
    """A reward model that answers when `settle` is called, as a server would: later, and from another thread."""

    def __init__(self, name: str, *domains: str, weight: float = 1.0, score: Callable[[str], float] = len) -> None:
        self.config = PreferenceConfig(name=name, model=Path("unused"), domains=domains, weight=weight)
        self.score = score
        self.waiting: list[tuple[Future[float], str]] = []

    def submit(self, problem: Problem, response: str) -> Future[float]:
        future: Future[float] = Future()
        self.waiting.append((future, response))
        return future

    def settle(self) -> None:
        for future, response in self.waiting:
            try:
                future.set_result(self.score(response))
            except EngineError as error:
                future.set_exception(error)
        self.waiting.clear()


LENGTH = Model("helpful", "general", "math", weight=0.5)
SHOUTS = Model("harmless", "safety", "general", weight=2.0, score=lambda text: -float(text.count("!")))
CONFIG = RewardConfig(accuracy_weight=3.0, format_weight=1.0, num_workers=1, timeout_seconds=20.0)


@pytest.fixture(scope="module")
def scorer():
    with Scorer(CONFIG, [problem("math", "math", "18")], preferences=(LENGTH, SHOUTS)) as made:
        yield made


def problem(domain: str, grader: str = "preference", answer: str | None = None) -> Problem:
    return Problem(id="p", domain=domain, messages=(), answer=answer, grader=grader)


RESPONSE = "<think>!</think><answer>18</answer>"


@pytest.mark.parametrize(
    ("asked", "parts", "total"),
    [
        (problem("safety"), {"format": 1.0, "harmless": -1.0}, 1.0 - 2.0),
        (
            problem("general"),
            {"format": 1.0, "helpful": float(len(RESPONSE)), "harmless": -1.0},
            1.0 + 0.5 * len(RESPONSE) - 2.0,
        ),
        # A problem with an answer has the reward model beside the rules, at once or after a worker's verdict.
        (
            problem("math", "math", "18"),
            {"accuracy": 1.0, "format": 1.0, "helpful": float(len(RESPONSE))},
            4.0 + 0.5 * len(RESPONSE),
        ),
        (
            problem("math", "math", "36/2"),
            {"accuracy": 1.0, "format": 1.0, "helpful": float(len(RESPONSE))},
            4.0 + 0.5 * len(RESPONSE),
        ),
        (problem("other", "math", "18"), {"accuracy": 1.0, "format": 1.0}, 4.0),
    ],
)
def test_a_problem_has_the_parts_of_its_domain(scorer, asked, parts, total):
    future = scorer.submit(asked, RESPONSE)
    for model in (SHOUTS, LENGTH):
        model.settle()
    reward = future.result(60)
    assert reward.parts == parts and list(reward.parts) == list(parts), "the order is the configuration's"
    assert reward.total == pytest.approx(total)


def test_a_reward_waits_for_every_model(scorer):
    future = scorer.submit(problem("general"), RESPONSE)
    SHOUTS.settle()
    assert not future.done()
    LENGTH.settle()
    assert future.done()


def test_a_problem_without_answer_has_no_accuracy_even_if_it_is_wrongly_formed(scorer):
    future = scorer.submit(problem("safety"), "no tags")
    SHOUTS.settle()
    assert future.result(0).parts == {"format": 0.0, "harmless": 0.0}


def test_a_problem_that_nobody_scores_is_an_error(scorer):
    with pytest.raises(DataError, match="problem p: no reward model scores domain 'poetry'"):
        scorer.submit(problem("poetry"), RESPONSE)


def test_a_model_that_fails_fails_the_reward(scorer):
    def broken(response: str) -> float:
        raise EngineError("reward-broken failed 4 times")

    judge = Model("broken", "general", score=broken)
    with Scorer(CONFIG, [problem("math", "math", "18")], preferences=(judge, LENGTH)) as both:
        future = both.submit(problem("general"), RESPONSE)
        judge.settle()
        LENGTH.settle()
    with pytest.raises(EngineError, match="failed 4 times"):
        future.result(0)


def test_problems_that_nobody_will_score_are_found_before_the_run():
    config = RewardConfig(preferences=(LENGTH.config, SHOUTS.config))
    known = [problem("general"), problem("safety"), problem("math")]
    for one in known:
        preference.GRADER.check(one, config)
    with pytest.raises(DataError, match=r"problem p: .*'poetry' \(those of rewards.preferences: general, math, safety"):
        preference.GRADER.check(problem("poetry"), config)
    with pytest.raises(DataError, match=r"rewards\.preferences: none"):
        preference.GRADER.check(known[0], RewardConfig())
