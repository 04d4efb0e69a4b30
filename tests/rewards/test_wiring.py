"""One scorer for all stages: what it needs comes from the problems, and a problem that cannot be graded is refused."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_r1.config.sandbox import SandboxConfig
from megatron_r1.config.schema import PreferenceConfig, RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.table import GRADERS
from megatron_r1.rewards.wiring import check_problems, scorer_for
from megatron_r1.types import Problem

HELPFUL = PreferenceConfig(name="helpful", model=Path("unused"), domains=("general",))
CONFIG = RewardConfig(num_workers=1, timeout_seconds=20.0, sandbox=SandboxConfig(allow_unisolated=True))


def problem(grader: str, **fields) -> Problem:
    given = {"id": "p", "domain": "general", "messages": ({"role": "user", "content": "?"},), "grader": grader}
    return Problem(**(given | fields))


class Constant:
    """A reward model that likes everything."""

    config = HELPFUL

    def submit(self, problem: Problem, response: str) -> Future[float]:
        done: Future[float] = Future()
        done.set_result(0.5)
        return done


NO_COMMA = problem("instructions", metadata={"instructions": [["punctuation:no_comma", {}]]})
DOUBLE = problem("code", metadata={"tests": {"asserts": ["assert f(2) == 4"], "entry_point": "f"}})
EIGHTEEN, WORD = problem("math", answer="18"), problem("exact", answer="yes")
OPEN = problem("preference")


def test_one_scorer_grades_every_kind_of_problem():
    program = "<think>x</think><answer>\n```python\ndef f(n):\n    return 2 * n\n```\n</answer>"
    asked = [
        (NO_COMMA, "<think>a, b</think><answer>one two</answer>", 1.0),
        (NO_COMMA, "<think>a</think><answer>one, two</answer>", 0.0),
        (EIGHTEEN, r"<think>x</think><answer>\frac{36}{2}</answer>", 1.0),
        (WORD, "<think>x</think><answer>no</answer>", 0.0),
        (DOUBLE, program, 1.0),
        (DOUBLE, program.replace("2 *", "3 *"), 0.0),
    ]
    config = dataclasses.replace(CONFIG, preferences=(HELPFUL,))
    with scorer_for(config, [NO_COMMA, EIGHTEEN, WORD, DOUBLE, OPEN], preferences=[Constant()]) as scorer:
        parts = [scorer.submit(one, text).result().parts for one, text, _ in asked]
        assert [part["accuracy"] for part in parts] == [score for _, _, score in asked]
        assert scorer.submit(OPEN, "<think>x</think><answer>hi</answer>").result().parts == {
            "format": 1.0,
            "helpful": 0.5,
        }


def test_a_worker_imports_what_the_problems_need():
    gym = problem("reasoning_gym", metadata={"task": "leg_counting", "arguments": {}, "seed": 0, "size": 1, "index": 0})
    with scorer_for(CONFIG, [EIGHTEEN]) as plain, scorer_for(CONFIG, [EIGHTEEN, gym, NO_COMMA]) as more:
        assert [one.name for one in plain._pool.functions] == ["math"]
        assert [one.name for one in more._pool.functions] == ["math", "reasoning_gym", "instructions"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (problem("guess"), "grader 'guess'; expected one of math, exact"),
        (problem("math"), "grader 'math' needs an answer and there is none"),
        (problem("exact", answer=" "), "grader 'exact' needs an answer"),
        (problem("math", answer="1", language="tlh"), "language is 'tlh'; it is no language"),
        (problem("code", metadata={"tests": {"nonsense": 1}}), "problem p: "),
        (problem("instructions", metadata={"instructions": [["no:such", {}]]}), "not one of keywords:existence"),
        (
            problem("instructions", metadata={"instructions": [["length_constraints:number_words", {}]]}),
            "problem p: instruction 'length_constraints:number_words': its arguments {} are incomplete",
        ),
        (
            problem("instructions", metadata={"instructions": [["keywords:existence", {"keywords": ["a", "("]}]]}),
            "are incomplete",
        ),
        (
            problem("instructions", metadata={"instructions": [["language:response_language", {"language": "xx"}]]}),
            "language is 'xx'",
        ),
        (problem("preference", domain="poetry"), "no reward model scores domain 'poetry'"),
    ],
)
def test_a_problem_that_cannot_be_graded_is_refused(wrong, said):
    config = RewardConfig(preferences=(HELPFUL,))
    with pytest.raises(DataError) as caught:
        check_problems([EIGHTEEN, wrong], config, reward_models=True)
    assert said in str(caught.value)


def test_a_preference_problem_needs_a_stage_that_runs_reward_models():
    config = RewardConfig(preferences=(HELPFUL,))
    check_problems([OPEN], config, reward_models=True)
    with pytest.raises(DataError, match="no reward model runs in this stage"):
        check_problems([OPEN], config, reward_models=False)
    with pytest.raises(DataError, match="no reward model runs in this stage"):
        scorer_for(config, [OPEN])


def test_every_grader_has_its_check():
    assert set(GRADERS) == {"math", "exact", "reasoning_gym", "code", "instructions", "preference"}
    check_problems(
        [NO_COMMA, DOUBLE, EIGHTEEN, WORD, problem("math", answer="1", language="zh-CN")], CONFIG, reward_models=False
    )
