"""Problems from a function of the user's own: `--data.source my_module:problems` (docs/extending.md).

    def problems() -> Iterable[Problem]: ...

It is called once in every process that needs the problems, and must give the same ones in the same order each time: the
stream's position is all that a restart keeps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from megatron_r1.errors import DataError
from megatron_r1.plugins import imported, told
from megatron_r1.types import Problem


def problems_from(path: str) -> tuple[Problem, ...]:
    """DataError with file and line where the function raises, and for anything but different problems."""
    function = imported(path, "data.source")
    try:
        found = tuple(function())
    except Exception as error:
        raise DataError(f"data.source {path}{told(error)}") from error
    ids = set[str]()
    for number, problem in enumerate(found):
        if not isinstance(problem, Problem):
            raise DataError(f"data.source {path}: item {number} is a {type(problem).__name__}; expected a Problem")
        if fault := _fault(problem):
            raise DataError(f"data.source {path}: item {number}: {fault}")
        if problem.id in ids:
            raise DataError(f"data.source {path}: problem id {problem.id!r} is given twice; ids must be unique")
        ids.add(problem.id)
    if not found:
        raise DataError(f"data.source {path} gave no problems")
    return found


def _fault(problem: Problem) -> str | None:
    """What of a problem is of the wrong kind. Whether it can be graded is rewards/wiring.py's to say."""
    texts = {"id": problem.id, "domain": problem.domain, "grader": problem.grader}
    texts |= {name: value for name in ("answer", "language") if (value := getattr(problem, name)) is not None}
    for name, value in texts.items():
        if not isinstance(value, str):
            return f"{name} is {value!r}; expected text"
    turns = problem.messages
    if not isinstance(turns, tuple) or not turns or not all(_is_turn(turn) for turn in turns):
        return f"messages is {turns!r}; expected a tuple of turns, each with role and content"
    try:
        json.dumps(dict(problem.metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"metadata is not plain JSON: {error}"
    return None


def _is_turn(turn: object) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(name), str) for name in ("role", "content"))
