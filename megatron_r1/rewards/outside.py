"""A grader of one's own, by import path: `--rewards.graders my_module:close` (docs/extending.md).

    def close(answer: str, problem: Problem) -> float | bool: ...
    def close(response: str, problem: Problem) -> float | bool: ...

A problem whose grader is that path is graded by it: 1 is right, 0 wrong, anything between a share. It is given the
answer, or, if its first parameter is called response, all that follows the thought; a response without it is wrong. It
runs in a grading worker as rewards.custom does: past rewards.timeout_seconds the score is 0, and what it raises stops
the run. A file of problems can name no function that the configuration does not: data start no code of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from megatron_r1.config.custom_grader import custom_grader
from megatron_r1.config.schema import AnswerPlace, RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.custom import number_in, plain_problem, problem_of
from megatron_r1.rewards.exact import GRADER as EXACT
from megatron_r1.rewards.format import after_thought
from megatron_r1.rewards.grader import Grader, WorkerFunction, in_answer
from megatron_r1.types import Problem


def check(problem: Problem, config: RewardConfig) -> None:
    """DataError for a problem whose grader the configuration does not name."""
    if problem.grader not in config.graders:
        named = ", ".join(config.graders) or "none"
        raise DataError(
            f"problem {problem.id}: grader {problem.grader!r} is not among rewards.graders ({named}); add it there if "
            "you trust its code"
        )


def quick(problem: Problem, answer: str | None) -> bool | None:
    """Nothing is wrong."""
    return None if answer else False


def whole(response: str, _: AnswerPlace) -> str:
    """What follows the thought."""
    return after_thought(response).strip()


def grade(function: Callable[..., Any], answer: str, reference: str | None, problem: Mapping[str, Any]) -> float:
    """The function's score, in the worker. Raises what the function raises, and where it gives no number in [0, 1]."""
    expected = "a grade is True, False or a number from 0 to 1"
    score = number_in(function(answer, problem_of(problem)), expected)
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"it gave {score!r}; {expected}")
    return score


@lru_cache(maxsize=256)
def outside_grader(path: str) -> Grader:
    """The grader at an import path, which is imported here to see what it takes. ConfigError if it cannot be used."""
    worker = WorkerFunction(
        name=f"grader {path}", function="megatron_r1.rewards.outside:grade", user=path, field="rewards.graders"
    )
    return Grader(
        name=path,
        check=check,
        reads=whole if custom_grader(path).sees_response else in_answer,
        quick=quick,
        worker=worker,
        metadata=plain_problem,
        once=True,
        votes_as=EXACT,
    )
