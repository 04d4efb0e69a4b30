"""Graders: one file each. A grader joins by its line in this table, and no other file names it.

Another one need not be here: a problem's grader may be the import path of a function in rewards.graders (outside.py,
docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.plugins import is_import_path
from megatron_r1.rewards import code_grader, exact, gym, instructions, math_grader, outside, preference
from megatron_r1.rewards.grader import Grader
from megatron_r1.rewards.outside import outside_grader
from megatron_r1.types import Problem


def by_name(*graders: Grader) -> Mapping[str, Grader]:
    """The table. TypeError for what is no grader, ValueError for two of one name."""
    found: dict[str, Grader] = {}
    for number, grader in enumerate(graders):
        if not isinstance(grader, Grader):
            raise TypeError(f"entry {number} of the table is {grader!r}; expected a Grader (rewards/grader.py)")
        if grader.name in found:
            raise ValueError(f"two graders of the table are called {grader.name!r}; rename one")
        found[grader.name] = grader
    return found


GRADERS = by_name(
    math_grader.GRADER,
    exact.GRADER,
    gym.GRADER,
    code_grader.GRADER,
    instructions.GRADER,
    preference.GRADER,
)


def grader_of(problem: Problem) -> Grader:
    """Who grades a problem: of the table, or of rewards.graders, as check_problems has made sure before anything is
    imported. DataError if nobody is called so."""
    if problem.grader in GRADERS:
        return GRADERS[problem.grader]
    if is_import_path(problem.grader):
        return outside_grader(problem.grader)
    raise DataError(
        f"problem {problem.id}: grader {problem.grader!r}; expected one of {', '.join(GRADERS)}, or a path of "
        "rewards.graders"
    )


def check_known(problem: Problem, config: RewardConfig) -> None:
    """DataError for a problem whose grader is an import path that the configuration does not name: before it is
    imported."""
    if problem.grader not in GRADERS and is_import_path(problem.grader):
        outside.check(problem, config)


def graders_of(problems: Iterable[Problem]) -> list[Grader]:
    """Who grades them, and who compares their answers in a vote; each once, those of the table in its order."""
    found: dict[str, Grader] = {}
    for problem in problems:
        if problem.grader not in found:
            found[problem.grader] = grader_of(problem)
    found |= {other.name: other for one in list(found.values()) if (other := one.votes_as) is not None}
    order = [*GRADERS, *found]
    return sorted(found.values(), key=lambda grader: order.index(grader.name))
