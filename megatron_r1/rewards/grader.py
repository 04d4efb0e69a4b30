"""What a grader is: one object that says everything the rest of the program asks of it.

A grader lives in a file of its own and joins by its line in table.py. Scorers, checks, workers and stages ask the
object; none of them knows a grader's name. A verdict comes from one of three places: `quick`, here and now; a `worker`
function, in a process that can be killed (pool.py); or a `runner` of the grader's own, such as a sandbox. Imports of
this file and of graders' own stay light: a worker that grades only mathematics reads them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_r1.errors import DataError

if TYPE_CHECKING:
    from megatron_r1.config.schema import AnswerPlace, RewardConfig
    from megatron_r1.rewards.pool import PoolCounts, Verdict
    from megatron_r1.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFunction:
    """What a worker runs, by import path, so that only the worker imports it.

    `function` is module:name of (answer, reference, metadata) -> float or bool. With `user`, the import path of a
    user's own function, it is of (user's function, answer, reference, metadata); `field` of the configuration names it.
    """

    name: str
    """By which jobs ask for it."""
    function: str
    imports: tuple[str, ...] = ()
    """Modules that it imports when it is called, imported before the first job, so that no answer's limit pays."""
    user: str = ""
    field: str = ""

    def plain(self) -> dict[str, Any]:
        """As plain JSON, for the worker's command line."""
        words = {"name": self.name, "function": self.function, "user": self.user, "field": self.field}
        return {**words, "imports": list(self.imports)}


class Runner(Protocol):
    """Grades in a way of its own, beside everything else."""

    def submit(self, problem: Problem, answer: str | None) -> Future[Verdict]: ...
    def counts(self) -> PoolCounts: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """What answers that solve nothing get of a problem: `fault` if it should be nothing at all."""

    fault: bool
    words: str


Attacker = Callable[[Sequence["Problem"], "RewardConfig", bool], list[list[Attack]]]
"""(problems, configuration, whether constant answers are tried too) to what passes, of each problem."""


def in_answer(response: str, place: AnswerPlace) -> str | None:
    """The stripped answer of a response, from where the configuration says (format.py)."""
    from megatron_r1.rewards.format import extract_answer

    return extract_answer(response, place)


def never_quick(problem: Problem, answer: str | None) -> None:
    """No verdict without the worker or the runner."""


def own_metadata(problem: Problem) -> Mapping[str, Any]:
    return problem.metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """One rule that finds an answer right or wrong."""

    name: str
    """What `Problem.grader` says."""
    check: Callable[[Problem, RewardConfig], None]
    """DataError, in one sentence, for a problem that lacks what the rule needs. It runs before anything expensive."""
    reads: Callable[[str, AnswerPlace], str | None] = in_answer
    """From a whole response, and where rewards.answer_from says that answers are, to what is graded; None: nothing."""
    quick: Callable[[Problem, str | None], bool | None] = never_quick
    """The verdict where it is cheap and certain, else None. DataError for a problem that cannot be graded."""
    worker: WorkerFunction | None = None
    """What of it runs in a killable worker."""
    metadata: Callable[[Problem], Mapping[str, Any]] = own_metadata
    """What the worker's function is told beside the answer and the problem's reference: plain JSON."""
    once: bool = False
    """Whether the worker grades equal answers to a problem once."""
    runner: Callable[[RewardConfig, Sequence[Problem]], Runner] | None = None
    """Makes what grades instead of a worker, for all problems to come. DataError, ConfigError."""
    has_accuracy: bool = True
    """Whether there is a right answer. If not, only reward models score its problems."""
    votes_as: Grader | None = None
    """Who says whether two answers are the same in a majority vote; None: itself, with one answer as the reference."""
    may_be_judged: bool = False
    """Whether a wrong answer may be a right one in other words, which a judge is asked about (rejection sampling)."""
    writes_code: bool = False
    """Whether a good response may hold a block of code."""
    attack: Attacker | None = None
    """What answers that solve nothing get of each problem, for check-data."""

    def __post_init__(self) -> None:
        ways = [self.worker is not None, self.runner is not None]
        if all(ways):
            raise ValueError(f"grader {self.name!r} has a worker and a runner; give it one of them")
        if self.has_accuracy and not any(ways) and self.quick is never_quick:
            raise ValueError(
                f"grader {self.name!r} has no way to a verdict: give it quick, a worker or a runner, or say "
                "has_accuracy=False"
            )
        if self.worker is not None and ":" not in self.worker.function:
            raise ValueError(
                f"grader {self.name!r}: its worker's function is {self.worker.function!r}; write module:function"
            )


def needs_answer(problem: Problem) -> None:
    """DataError for a problem without a reference answer."""
    if not (problem.answer or "").strip():
        raise DataError(f"problem {problem.id}: grader {problem.grader!r} needs an answer and there is none")


def needed(problem: Problem, name: str) -> Any:
    """metadata[name]. DataError if there is none of that name."""
    if name not in problem.metadata:
        raise DataError(f"problem {problem.id}: grader {problem.grader!r} needs metadata[{name!r}] and there is none")
    return problem.metadata[name]
