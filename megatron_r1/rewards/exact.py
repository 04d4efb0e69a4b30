"""The grader "exact": an answer is right if it is the reference, white space at the ends aside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.errors import DataError
from megatron_r1.rewards.grader import Grader, needs_answer
from megatron_r1.rewards.math_grader import GRADER as MATH

if TYPE_CHECKING:
    from megatron_r1.config.schema import RewardConfig
    from megatron_r1.types import Problem


def check(problem: Problem, _: RewardConfig) -> None:
    """DataError for a problem without an answer."""
    needs_answer(problem)


def quick(problem: Problem, answer: str | None) -> bool:
    """Equality of texts; no answer is wrong."""
    if problem.answer is None:
        raise DataError(f"problem {problem.id}: grader {problem.grader!r} needs an answer and there is none")
    return bool(answer) and answer == problem.answer.strip()


GRADER = Grader(name="exact", check=check, quick=quick, votes_as=MATH, may_be_judged=True)
