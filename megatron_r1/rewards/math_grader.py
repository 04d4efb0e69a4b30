"""The grader "math": answers that mean the same in mathematics are equal (docs/answers.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_r1.errors import DataError
from megatron_r1.rewards.grader import Grader, WorkerFunction, needs_answer

if TYPE_CHECKING:
    from megatron_r1.config.schema import RewardConfig
    from megatron_r1.types import Problem

INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")
"""An integer in its one canonical spelling."""

LONGEST_ANSWER = 2000
"""Characters; no longer answer is read (rewards/math)."""

MAX_QUESTION_CHARACTERS = 4000
"""Of a question's end, which asks; the worker looks for what kind of answer is asked for."""


def check(problem: Problem, _: RewardConfig) -> None:
    """DataError for a problem without an answer, or with one that no answer could match."""
    needs_answer(problem)
    length = len((problem.answer or "").strip())
    if length > LONGEST_ANSWER:
        raise DataError(
            f"problem {problem.id}: answer has {length} characters, as a solution has, and no \\boxed{{}}; nothing "
            f"that a model answers would match it: give the final answer alone (at most {LONGEST_ANSWER} characters)"
        )


def quick(problem: Problem, answer: str | None) -> bool | None:
    """Sound: a reference is right by definition, no answer is wrong, and two canonical integers are equal only if their
    spellings are."""
    if problem.answer is None:
        raise DataError(f"problem {problem.id}: grader {problem.grader!r} needs an answer and there is none")
    reference = problem.answer.strip()
    if not answer:
        return False
    if answer == reference:
        return True
    return False if INTEGER.fullmatch(answer) and INTEGER.fullmatch(reference) else None


def metadata(problem: Problem) -> Mapping[str, Any]:
    """With the end of the question, which says whether a percentage is asked for."""
    if not problem.messages:
        return problem.metadata
    return {**problem.metadata, "question": problem.messages[-1]["content"][-MAX_QUESTION_CHARACTERS:]}


def grade(answer: str, reference: str | None, given: Mapping[str, Any]) -> bool:
    """In the worker: whether the answer and the reference mean the same."""
    from megatron_r1.rewards.math import answers_equal

    return reference is not None and answers_equal(reference, answer, given.get("question", ""))


GRADER = Grader(
    name="math",
    check=check,
    quick=quick,
    worker=WorkerFunction(
        name="math", function="megatron_r1.rewards.math_grader:grade", imports=("megatron_r1.rewards.math",)
    ),
    metadata=metadata,
    once=True,
    may_be_judged=True,
)
