"""From a configuration and the problems to come to the Scorer that grades them, the same for every stage and tool.

What a scorer needs follows from the problems' graders (a sandbox for programs, a worker that knows instructions, ...),
so nobody says it twice and nobody forgets it. Whether every problem can be graded at all is looked at here too, before
a server starts. Left out: grading itself (compose.py) and running reward models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_r1.config.custom_reward import custom_reward
from megatron_r1.config.languages import language_fault
from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rewards.preference import Preference
from megatron_r1.rewards.table import check_known, grader_of
from megatron_r1.types import Problem


def scorer_for(config: RewardConfig, problems: Iterable[Problem], *, preferences: Sequence[Preference] = ()) -> Scorer:
    """The scorer of these problems; close it. `problems`: all of those in files, and one of each procedural task at
    least. `preferences`: the reward models that run.

    DataError for a problem that cannot be graded, ConfigError where this machine has no sandbox that is allowed."""
    problems = list(problems)
    check_problems(problems, config, reward_models=bool(preferences))
    custom = [custom_reward(entry) for entry in config.custom]
    return Scorer(config, problems, preferences=preferences, custom=custom)


def has_accuracy(problem: Problem, config: RewardConfig) -> bool:
    """Whether there is a right answer, so that a problem can be held out. DataError for an unknown grader."""
    check_known(problem, config)
    return grader_of(problem).has_accuracy


def check_problems(problems: Iterable[Problem], config: RewardConfig, *, reward_models: bool) -> None:
    """DataError for the first problem that cannot be graded: said before the run, which may draw it only after a
    thousand steps. `reward_models`: whether the stage runs those of the configuration."""
    for problem in problems:
        check_known(problem, config)
        grader = grader_of(problem)
        if problem.language is not None and (fault := language_fault(problem.language)):
            raise DataError(f"problem {problem.id}: language is {fault}")
        if not grader.has_accuracy and not reward_models:
            raise DataError(
                f"problem {problem.id}: grader {grader.name!r}, and no reward model runs in this stage: it needs to "
                "know what is right; leave the problem out"
            )
        grader.check(problem, config)
