"""From a configuration and the problems to come to the Scorer that grades them, the same for every stage and tool.

What a scorer needs follows from the problems (a sandbox for programs, a worker that knows instructions, ...), so nobody
says it twice and nobody forgets it. Whether every problem can be graded at all is looked at here too, before a server
starts. Left out: grading itself (compose.py) and running reward models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_r1.config.custom_reward import custom_reward
from megatron_r1.config.languages import language_fault
from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.code import parse_tests
from megatron_r1.rewards.compose import Preference, Scorer, check_preference_problems
from megatron_r1.rewards.instructions import check_instruction
from megatron_r1.types import Problem

Check = Callable[[Problem, RewardConfig], None]


def scorer_for(config: RewardConfig, problems: Iterable[Problem], *, preferences: Sequence[Preference] = ()) -> Scorer:
    """The scorer of these problems; close it. `problems`: all of those in files, and one of each procedural task at
    least. `preferences`: the reward models that run.

    DataError for a problem that cannot be graded, ConfigError where this machine has no sandbox that is allowed."""
    problems = list(problems)
    check_problems(problems, config, reward_models=bool(preferences))
    graders = {problem.grader for problem in problems}
    return Scorer(
        config,
        graders=("math", "reasoning_gym") if "reasoning_gym" in graders else ("math",),
        programs=[problem for problem in problems if problem.grader == "code"],
        preferences=preferences,
        custom=[custom_reward(entry) for entry in config.custom],
        instructions="instructions" in graders,
    )


def check_problems(problems: Iterable[Problem], config: RewardConfig, *, reward_models: bool) -> None:
    """DataError for the first problem that cannot be graded: said before the run, which may draw it only after a
    thousand steps. `reward_models`: whether the stage runs those of the configuration."""
    for problem in problems:
        if problem.grader not in CHECKS:
            raise DataError(f"problem {problem.id}: grader {problem.grader!r}; expected one of {', '.join(CHECKS)}")
        if problem.language is not None and (fault := language_fault(problem.language)):
            raise DataError(f"problem {problem.id}: language is {fault}")
        if problem.grader == "preference" and not reward_models:
            raise DataError(
                f"problem {problem.id}: grader 'preference', and no reward model runs in this stage: it needs to know "
                "what is right; leave the problem out"
            )
        CHECKS[problem.grader](problem, config)


def _check_answer(problem: Problem, _: RewardConfig) -> None:
    if not (problem.answer or "").strip():
        raise DataError(f"problem {problem.id}: grader {problem.grader!r} needs an answer and there is none")


def _check_preference(problem: Problem, config: RewardConfig) -> None:
    check_preference_problems([problem], config)


def _check_tests(problem: Problem, _: RewardConfig) -> None:
    tests = _metadata(problem, "tests")
    try:
        parse_tests(tests)
    except DataError as error:
        raise DataError(f"problem {problem.id}: {error}") from None


def _metadata(problem: Problem, name: str) -> Any:
    """DataError if there is none of that name."""
    if name not in problem.metadata:
        raise DataError(f"problem {problem.id}: grader {problem.grader!r} needs metadata[{name!r}] and there is none")
    return problem.metadata[name]


def _check_task(problem: Problem, _: RewardConfig) -> None:
    for name in ("task", "arguments", "seed", "size", "index"):
        _metadata(problem, name)


def _check_instructions(problem: Problem, _: RewardConfig) -> None:
    instructions = _metadata(problem, "instructions")
    try:
        for name, arguments in instructions:
            check_instruction(name, arguments)
    except (TypeError, ValueError) as error:  # not pairs, or a DataError
        raise DataError(f"problem {problem.id}: {error}") from None


CHECKS: Mapping[str, Check] = {
    "math": _check_answer,
    "exact": _check_answer,
    "reasoning_gym": _check_task,
    "code": _check_tests,
    "instructions": _check_instructions,
    "preference": _check_preference,
}
"""What each grader needs of a problem."""
